"""The chunked forms of a model's recurrences against their steps, on what the model gives them.

Served, prompts go through the one and new tokens through the other. A program whose chunked form is
another recurrence than its step is lowered as faithfully as any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor, fx

from compiler import evaluate
from compiler.comm import Simulated
from compiler.ir import Block, Program
from compiler.recurrence import Recurrence, recurrence
from compiler.rewrite import calls_of, copy_block
from funcmodels import tree
from funcmodels.check_recurrence import RecurrenceError
from funcmodels.in_float64 import in_float64, wide, widened
from funcmodels.ops.recurrent_results import line_of, name_of
from funcmodels.state import State

LENGTH = 24  # tokens, the prompts' own, as often as need be
CHUNKS = (1, 7)
TOLERANCE = 1e-5  # relative to the largest element, in float64; norms are computed in float32


def check_forms(program: Program, weights: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Compare both forms of each recurrence, in float64, in chunks of some lengths.

    Args:
        program: as traced, of flat tokens.
        weights: whole.
        prompts: token ids.
    Raises:
        RecurrenceError: results differ by more than `TOLERANCE`; names the lines of both.
    """
    nodes = [node for block in program.all() for node in calls_of(block, recurrence)]
    if not any(_of(node).chunked for node in nodes):
        return
    tokens = torch.tensor(list(islice(cycle(chain.from_iterable(prompts)), LENGTH)))
    weights = tree.map(widened, weights)
    want = _results(_with(program, lambda found: replace(found, chunked=None)), weights, tokens)
    for chunk in CHUNKS:
        forms = _with(program, lambda found, n=chunk: replace(found, chunk=n))
        for one, other in zip(want, _results(forms, weights, tokens), strict=True):
            for a, b in zip(one.results, other.results, strict=True):
                error = _difference(a, b)
                if error > TOLERANCE:
                    raise _error(other.recurrence, chunk, error)


@dataclass(frozen=True)
class _Ran:
    """A recurrence that was run, and its results."""

    recurrence: Recurrence
    results: tuple[Tensor, ...]


def _of(node: fx.Node) -> Recurrence:
    return node.kwargs["recurrence"]  # type: ignore[return-value]


def _with(program: Program, change: Callable[[Recurrence], Recurrence]) -> Program:
    """A program with other recurrences, whose states are as wide as can be."""

    def one(block: Block) -> Block:
        block = copy_block(block)
        for node in calls_of(block, recurrence):
            found = change(_of(node))
            slots = {name: replace(slot, dtype=wide(slot.dtype)) for name, slot in found.slots}
            made: Any = replace(found, state=State(slots, found.state.where))
            node.kwargs = {**node.kwargs, "recurrence": made}
        return block

    blocks = {name: one(block) for name, block in program.blocks.items()}
    return replace(program, root=one(program.root), blocks=blocks)


def _results(program: Program, weights: Any, tokens: Tensor) -> list[_Ran]:
    """What each recurrence computes, in the order in which they are run."""
    found: list[_Ran] = []

    def see(node: fx.Node, values: list[Any]) -> None:
        if node.target is recurrence:
            found.append(_Ran(_of(node), values[0]))

    comm = Simulated(1)
    local = evaluate.local_weights(program, weights, comm)
    with torch.no_grad(), in_float64():
        evaluate.run(program, local, tokens, torch.arange(len(tokens)), comm, seen=see)
    return found


def _difference(want: Tensor, got: Tensor) -> float:
    if want.shape != got.shape:
        return float("inf")
    want, got = (t if t.is_complex() else t.double() for t in (want, got))
    error = ((got - want).abs().max() / want.abs().max().clamp(min=1e-12)).item()
    return error if error == error else float("inf")


def _error(found: Recurrence, chunk: int, error: float) -> RecurrenceError:
    assert found.chunked is not None
    step, chunked = found.step.function, found.chunked.function
    return RecurrenceError(
        f"{name_of(chunked)} is not its step: prompts would be read otherwise than new tokens",
        got=f"results that differ by {error:.2g} of the largest, with chunks of {chunk}",
        need=f"at most {TOLERANCE:g}, in float64",
        step=line_of(step),
        from_=line_of(chunked),
        fix=f"fm.check_recurrence({name_of(step)}, {name_of(chunked)}, state, xs), which tells "
        "results, states and gradients apart",
    )
