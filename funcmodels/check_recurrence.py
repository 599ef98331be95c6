"""`fm.check_recurrence`: a recurrence's chunked form against its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcmodels import tree
from funcmodels.errors import FuncModelsError
from funcmodels.ops.recurrent import Step, by_chunk, by_token, given, initial
from funcmodels.ops.recurrent_check import batch_dims_of, check_closure
from funcmodels.source import SourceLine
from funcmodels.state import Slot, State

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

    All is computed in float64, so that what differs is a mistake and not rounding.

    Args:
        step, chunked, state, xs, params: as for `ops.recurrent`; xs of some tens of tokens.
        tolerance: the greatest difference, relative to the greatest value of its kind.
        seed: of the random state and the random weights of the results.
    Returns:
        The greatest relative difference.
    Raises:
        RecurrenceError: they differ by more; the message names what, and the length of the chunks.
    """
    for fn in (step, chunked):
        check_closure(fn)
    dims = batch_dims_of(step, state, xs, None, params)
    wide = State({name: _wide(slot) for name, slot in state.slots.items()}, state.where)
    generator = torch.Generator().manual_seed(seed)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    xs, params = tree.map(_double, xs), tree.map(_double, params)
    inputs = (tree.map(random, initial(wide, xs, dims)), xs, params)
    want = _results(step, wide, inputs, dims, None, seed)
    worst = 0.0
    for length in LENGTHS:
        got = _results(chunked, wide, inputs, dims, length, seed)
        for path, value in tree.items(want):
            other = dict(tree.items(got)).get(path)
            error = _difference(value, other)
            worst = max(worst, error)
            if error > tolerance:
                code = getattr(chunked, "__code__", None)
                raise RecurrenceError(
                    f"{getattr(chunked, '__name__', chunked)} is not its step: {path} differ",
                    got=f"a relative difference of {error:.2g} with chunks of {length}",
                    need=f"at most {tolerance:g}, in float64",
                    from_=code and SourceLine(code.co_filename, code.co_firstlineno, code.co_name),
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

    def loss(floating: dict[str, Tensor]) -> Any:
        carry, ys = run(*tree.map_with_path(lambda path, x: floating.get(path, x), inputs))
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64)
        for leaf in tree.leaves((carry, ys)):
            total = total + (leaf * torch.randn(leaf.shape, generator=generator)).sum()
        return total, {"the last states": carry, "the results": ys}

    floating = {path: x for path, x in tree.items(inputs) if _is_floating(x)}
    grads, values = torch.func.grad(loss, has_aux=True)(floating)
    return values | {"the gradients": grads}


def _difference(want: Tensor, got: Any) -> float:
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return float("inf")
    scale = want.abs().max().clamp(min=1e-12)
    error = ((got - want).abs().max() / scale).item()
    return error if error == error else float("inf")


def _wide(slot: Slot) -> Slot:
    return Slot(slot.axes, slot.shape, torch.float64, slot.init)


def _double(x: Any) -> Any:
    return x.double() if _is_floating(x) else x


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
