"""`fm.verify`: the pure function against the program that is served, operation by operation.

The compiler's own oracle, on a user's model and weights: every step of the lowering is run on
simulated ranks, its layers by their meaning in plain torch, and compared with the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from compiler import evaluate
from compiler.check import check_needs
from compiler.comm import Comm, Simulated
from compiler.compare_forms import check_forms
from compiler.emit import emit_model
from compiler.ir import Program, TensorType, target_name
from compiler.pad_vocabulary import pad_vocabulary
from compiler.partition import Partitioned
from compiler.placement import Partial, Placement, Shard
from compiler.refuse import defined
from compiler.vllm_target import lowering
from funcmodels.errors import FuncModelsError
from funcmodels.source import SourceLine
from funcmodels.spec import Model

# Of the largest element of a value: what rounding may change, through all of a model's layers.
TOLERANCES = {
    torch.float64: 1e-5,  # norms are computed in float32
    torch.float32: 1e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 2e-1,
}


class VerificationError(FuncModelsError):
    """A served program computes something else than the function it was made of."""


@dataclass(frozen=True)
class Verified:
    """What was compared.

    Args:
        model, tp: its name, and the simulated ranks.
        steps: of the lowering, each of which gave the function's logits.
        difference: the largest one of logits, relative to the largest logit.
    """

    model: str
    tp: int
    steps: tuple[str, ...]
    difference: float


def verify(
    model: Model, weights: Any, prompts: Sequence[Sequence[int]], *, tp: int = 1
) -> Verified:
    """Compare the function with every step of its lowering, on simulated ranks; without vLLM.

    Args:
        model: the model.
        weights: whole weights; in float64 or float32, or rounding hides what there is to see.
        prompts: token ids, each prompt a run of its own.
        tp: tensor-parallel ranks, all in this process.
    Returns:
        What was compared, and the largest difference.
    Raises:
        VerificationError: names the first step of the lowering whose logits differ by more than the
            dtype's tolerance, and in it the first operation that does, with the user's line.
        RecurrenceError: a recurrence's chunked form is not its step, on what the model gives it.
        ShardingError: the axes do not divide over so many ranks, nor does the vocabulary as the
            engine pads it: it is padded here too, where it has to be.
        TraceError, LoweringError: the model cannot be served.
    """
    found: list[tuple[str, Program]] = list(lowering(model))
    _, traced = found[0]
    lowered = found[-1][1]
    assert isinstance(lowered, Partitioned)
    emit_model(lowered)  # refuses what serving does
    if (more := pad_vocabulary(model, weights, lowered, tp)) is not None:
        return verify(*more, prompts, tp=tp)
    check_needs(model, lowered.needs, tp)
    check_forms(traced, weights, prompts)
    worst = 0.0
    for prompt in prompts:
        tokens = torch.tensor(list(prompt))
        want = model.forward(weights, tokens, torch.arange(len(prompt)))
        for name, program in found:
            comm = Simulated(tp if isinstance(program, Partitioned) else 1)
            logits = _run(program, weights, tokens, comm)
            differences = [_difference(one, want) for one in logits]
            if max(differences) > _tolerance(want):
                if program is traced:
                    raise _another_function(model, len(prompt), max(differences))
                at = _first_difference(traced, program, weights, tokens, comm)
                raise _error(model, name, at, max(differences), tp)
            worst = max(worst, *differences)
    return Verified(model.name, tp, tuple(name for name, _ in found), worst)


def _run(
    program: Program, weights: Any, tokens: Tensor, comm: Comm, seen: evaluate.Seen | None = None
) -> list[Tensor]:
    local = evaluate.local_weights(program, weights, comm)
    positions = torch.arange(len(tokens))
    with torch.no_grad():
        return evaluate.run(program, local, tokens, positions, comm, seen=seen)


def _difference(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest element."""
    if not (got.isfinite().all() and want.isfinite().all()):
        return 0.0 if got.equal(want) else float("inf")
    scale = want.abs().max().item() or 1.0
    return (got - want).abs().max().item() / scale


def _tolerance(value: Tensor) -> float:
    return TOLERANCES.get(value.dtype, 0.0)


@dataclass
class _Event:
    """An operation that was done: its value, whole and with its features flat."""

    node: fx.Node
    value: Tensor
    same: bool  # on all ranks, where it should be
    matches: bool = False


@dataclass
class _Recorder:
    """The operations of a run, in their order."""

    comm: Comm
    events: list[_Event] = field(default_factory=list)

    def __call__(self, node: fx.Node, values: list[Any]) -> None:
        type_ = node.meta["type"]
        if not isinstance(type_, TensorType) or not type_.dtype.is_floating_point:
            return
        at: Placement | None = node.meta.get("placement")
        same = True
        if isinstance(at, Shard):
            (whole, *_) = self.comm.whole(values, at.dim, at.units)
        elif isinstance(at, Partial):
            (whole, *_) = self.comm.total(values)
        else:
            whole = values[0]
            same = all(_difference(v, whole) <= _tolerance(whole) for v in values[1:])
        flat = whole.reshape(whole.shape[0], -1) if whole.ndim else whole
        self.events.append(_Event(node, flat, same))


def _first_difference(
    traced: Program, program: Program, weights: Any, tokens: Tensor, comm: Comm
) -> tuple[_Event, SourceLine] | None:
    """The first operation whose value the function never has, nor any that is made of it.

    Passes fuse, split and reorder operations, so that values are compared with all of their shape.
    """
    wanted, got = _Recorder(Simulated(1)), _Recorder(comm)
    _run(traced, weights, tokens, wanted.comm, wanted)
    _run(program, weights, tokens, comm, got)
    shapes: dict[Any, list[Tensor]] = {}
    for event in wanted.events:
        shapes.setdefault(tuple(event.value.shape), []).append(event.value)
    for event in got.events:
        alike = shapes.get(tuple(event.value.shape))
        found = alike is None or any(
            _difference(event.value, value) <= _tolerance(value) for value in alike
        )
        event.matches = found and event.same
    good = {event.node for event in got.events if event.matches}
    for event in got.events:
        if not event.matches and not _leads_to(event.node, good):
            return event, event.node.meta["where"]
    return None


def _leads_to(node: fx.Node, good: set[fx.Node]) -> bool:
    """Whether something that is made of a value is right: then it was another view of the right."""
    todo, seen = list(node.users), set()
    while todo:
        user = todo.pop()
        if user in seen or user.op == "output":
            continue
        if user in good:
            return True
        seen.add(user)
        todo += user.users
    return False


def _another_function(model: Model, count: int, difference: float) -> VerificationError:
    return VerificationError(
        f"{model.name} does something else for {count} tokens than when it was recorded",
        got=f"logits that differ by {difference:.2g} of the largest, before anything is lowered",
        need="a function that does the same each time, for any number of tokens",
        from_=defined(model.forward),
        fix="look for what it reads beside its arguments: globals that change, caches, the time, "
        "or the number of tokens in a library's code",
    )


def _error(
    model: Model, step: str, found: tuple[_Event, SourceLine] | None, difference: float, tp: int
) -> VerificationError:
    node = None
    if found is not None:
        event, _ = found
        node = f"{event.node.name} = {target_name(event.node.target)}(...)"
        if not event.same:
            node += ", which differs between ranks"
    return VerificationError(
        f"after {step}, {model.name} computes something else than its function",
        got=f"logits that differ by {difference:.2g} of the largest, tp={tp}",
        need="equal logits, but for rounding",
        node=node,
        from_=found[1] if found else None,
        fix="this is a fault of the compiler: please report it with this message",
    )
