"""`fm.check_recurrence`: a recurrence's chunked form against its step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcmodels import tree
from funcmodels.errors import FuncModelsError
from funcmodels.in_float64 import in_float64, wide, widened
from funcmodels.ops.recurrent import Step, by_chunk, by_token, given, initial
from funcmodels.ops.recurrent_check import batch_dims_of, check_closure
from funcmodels.ops.recurrent_results import line_of, name_of
from funcmodels.state import State

LENGTHS = (1, 2, 3, 7, 16)


class RecurrenceError(FuncModelsError):
    """A chunked form does not compute what its step does."""


def check_recurrence(
    step: Step,
    chunked: Step,
    state: State,
    xs: Any,
    *,
    params: Any = None,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> float:
    """Compare the two forms on given inputs, cut in chunks of several lengths: results, the state
    after the last token, and the gradients of both by all inputs, from a random state.

    All is computed in float64, so that what differs is a mistake and not rounding: there, casts to
    a floating dtype, as `x.float()`, are casts to float64.

    Args:
        step, chunked, state, xs, params: as for `ops.recurrent`; xs of some tens of tokens.
        tolerance: the greatest difference, relative to the greatest value of its kind.
        seed: of the random state and the random weights of the results. What of a state is no
            floating number begins as it is declared.
    Returns:
        The greatest relative difference.
    Raises:
        RecurrenceError: they differ by more; the message names what, and the length of the chunks.
    """
    for fn in (step, chunked):
        check_closure(fn)
    dims = batch_dims_of(step, state, xs, None, params)
    slots = {name: replace(slot, dtype=wide(slot.dtype)) for name, slot in state.slots.items()}
    declared = State(slots, state.where)
    generator = torch.Generator().manual_seed(seed)

    def random(like: Tensor) -> Tensor:
        if not _has_gradient(like):
            return like
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    xs, params = tree.map(widened, xs), tree.map(widened, params)
    with in_float64():
        inputs = (tree.map(random, initial(declared, xs, dims)), xs, params)
        want = _results(step, declared, inputs, dims, None, seed)
        worst = 0.0
        for length in LENGTHS:
            got = _results(chunked, declared, inputs, dims, length, seed)
            path, error = _worst(want, got)
            worst = max(worst, error)
            if error > tolerance:
                raise RecurrenceError(
                    f"{name_of(chunked)} is not its step: {path} differ",
                    got=f"a relative difference of {error:.2g} with chunks of {length}",
                    need=f"at most {tolerance:g}, in float64",
                    step=line_of(step),
                    from_=line_of(chunked),
                    fix="chunks of 1 that differ: the update itself; only longer ones: what tokens "
                    "of one chunk are to each other",
                )
    return worst


def _results(
    fn: Step, state: State, inputs: Any, dims: int, length: int | None, seed: int
) -> dict[str, Any]:
    """Results, last state, and the gradients of a random weighting of both."""

    def run(carry: Any, xs: Any, params: Any) -> Any:
        of = given(fn, params)
        if length is None:
            return by_token(of, state, carry, xs, dims)
        return by_chunk(of, state, carry, xs, dims, length)

    def loss(changed: dict[str, Tensor]) -> Any:
        carry, ys = run(*tree.map_with_path(lambda path, x: changed.get(path, x), inputs))
        carry = {name: carry[name] for name in state.slots}
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros(())
        for _, leaf in sorted(tree.items((carry, ys)), key=lambda item: item[0]):
            real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            total = total + (real * torch.randn(real.shape, generator=generator)).sum()
        return total, {"the last states": carry, "the results": ys}

    changed = {path: x for path, x in tree.items(inputs) if _has_gradient(x)}
    grads, values = torch.func.grad(loss, has_aux=True)(changed)
    return values | {"the gradients": grads}


def _worst(want: Any, got: Any) -> tuple[str, float]:
    """Where two trees differ most, and by how much, relative to the greatest value there."""
    wanted, found = dict(tree.items(want)), dict(tree.items(got))
    errors = {path: _difference(wanted.get(path), found.get(path)) for path in wanted | found}
    return max(errors.items(), key=lambda item: item[1])


def _difference(want: Any, got: Any) -> float:
    if not isinstance(got, Tensor) or not isinstance(want, Tensor) or got.shape != want.shape:
        return float("inf")
    want, got = (t if t.is_complex() else t.double() for t in (want, got))
    scale = want.abs().max().clamp(min=1e-12)
    error = ((got - want).abs().max() / scale).item()
    return error if error == error else float("inf")


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
