"""What `ops.recurrent` asks of its functions and their arguments."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from funcmodels import tree
from funcmodels.errors import ShapeError, TraceError
from funcmodels.ops.recurrent_results import (
    PRIMES,
    check_pair,
    check_state,
    line_of,
    name_of,
    shapes_of,
    shapes_said,
)
from funcmodels.source import users_line
from funcmodels.state import State

MOST_FOUND = 512
_FOUND: dict[Any, int] = {}  # by step and shapes, how many batch dims there are


def batch_dims_of(
    step: Callable,
    state: State,
    xs: Any,
    segment_ids: Tensor | None,
    params: Any = None,
    given: int | None = None,
) -> int:
    """How many dims of xs' leaves come before seq.

    segment_ids tell, or the caller. Otherwise it is the number for which `step` keeps the shapes
    of the state: see `_found`.
    """
    leaves = tree.leaves(xs)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        _bad_xs(step, xs, "tensors")
    if segment_ids is not None:
        dims = segment_ids.ndim - 1
        if any(leaf.shape[: dims + 1] != segment_ids.shape for leaf in leaves):
            _bad_xs(step, xs, f"{tuple(segment_ids.shape)} of segment_ids as first dims")
        if given not in (None, dims):
            _bad_xs(step, xs, f"{dims} batch dims, as segment_ids have, and not {given}")
        return dims
    least = min(leaf.ndim for leaf in leaves)
    shared = 0  # leading dims that all leaves have in common
    while shared < least and len({leaf.shape[shared] for leaf in leaves}) == 1:
        shared += 1
    if shared == 0:
        _bad_xs(step, xs, "(*batch, seq, ...), with the same first dims in every leaf")
    if given is not None:
        if not 0 <= given < shared:
            _bad_xs(step, xs, f"the same {given + 1} first dims in every leaf: (*batch, seq)")
        return given
    if torch.compiler.is_compiling():
        return _found_outside(step, state, xs, params, shared)
    key = _key(step, state, xs, params)
    if key is None:
        return _found(step, state, xs, params, shared)
    if key not in _FOUND:
        if len(_FOUND) >= MOST_FOUND:
            _FOUND.clear()
        _FOUND[key] = _found(step, state, xs, params, shared)
    return _FOUND[key]


def _key(step: Any, state: State, xs: Any, params: Any) -> Any:
    """All that a trial of the step depends on, or None where it cannot be compared.

    A function that is defined anew at each call is the same one if its code is, and what it closes
    over.
    """
    if isinstance(step, types.FunctionType):
        cells = tuple(inspect.getclosurevars(step).nonlocals.items())
        defaults = (step.__defaults__, tuple((step.__kwdefaults__ or {}).items()))
        fn = (step.__code__, cells, defaults)
    else:
        fn = (step,)
    leaves = tuple(
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf
        for leaf in tree.leaves((xs, params))
    )
    structure = str(tree.structure((xs, params)))
    key = (fn, tuple(state.slots.items()), leaves, structure)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _found(step: Callable, state: State, xs: Any, params: Any, shared: int) -> int:
    """The number of batch dims for which `step` keeps the shapes of the state.

    Tried on the meta device, where nothing is computed, with batch sizes that are no other dim's.
    """
    found: dict[int, tuple[dict, dict]] = {}
    errors: list[Exception] = []
    for dims in range(min(shared, len(PRIMES) + 1)):
        try:
            found[dims] = _on_meta(step, state, xs, dims, params)
        except Exception as error:
            errors.append(error)
    fits = [
        dims for dims, (before, after) in found.items() if _shape_of(before) == _shape_of(after)
    ]
    if len(fits) == 1:
        return fits[0]
    if fits:
        _cannot_tell(step, xs, fits)
    if not found:  # the step itself fails: let its own error be seen
        with shapes_said(step, state, xs):
            raise errors[0]
    before, after = next(iter(found.values()))
    check_state(step, state, after, before)
    raise AssertionError("a state that is kept, and is not")


# Trials fail, and a graph has no place for that.
_found_outside: Any = torch.compiler.disable(
    _found, reason="without batch_dims, ops.recurrent tries the step"
)


def _shape_of(state: Any) -> Any:
    if not isinstance(state, dict):
        return None
    return {name: getattr(value, "shape", None) for name, value in state.items()}


def _on_meta(step: Callable, state: State, xs: Any, dims: int, params: Any) -> tuple[dict, dict]:
    """The state before and after one step, without values."""

    def empty(x: Any, shape: tuple[int, ...] | None = None) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty(x.shape if shape is None else shape, dtype=x.dtype, device="meta")

    batch = PRIMES[:dims]
    x = tree.map(lambda x: empty(x, (*batch, *x.shape[dims + 1 :])), xs)
    before = state.initial(batch, torch.device("meta"))
    shared = () if params is None else (tree.map(empty, params),)
    with torch.device("meta"):  # what the step makes is there too
        result = step(dict(before), x, *shared)
    check_pair(step, result)
    return before, result[0]


def _cannot_tell(step: Callable, xs: Any, fits: list[int]) -> NoReturn:
    raise ShapeError(
        f"{name_of(step)}: several dims of xs may be the tokens",
        got=f"xs {shapes_of(xs)}; the state keeps its shape with "
        f"{' or '.join(map(str, fits))} batch dims",
        need="one way to read them",
        from_=users_line(),
        fix=f"batch_dims={fits[-1]} or {fits[0]} of ops.recurrent, or segment_ids (*batch, seq)",
    )


def check_closure(fn: Callable) -> None:
    """A step's tensors are its arguments.

    Raises:
        TraceError: one comes from outside: it would have no place in a state or on a rank.
    """
    for name, value in _outside(fn):
        if isinstance(value, (Tensor, nn.Module)) or any(
            isinstance(leaf, Tensor) for leaf in tree.leaves(value)
        ):
            raise TraceError(
                f'{name_of(fn)} uses "{name}", a tensor from outside',
                need="a function of its arguments alone",
                from_=line_of(fn),
                fix=f'params={{"{name}": {name}}} of ops.recurrent: a third argument of the step',
            )


def _outside(fn: Any) -> Iterator[tuple[str, Any]]:
    """Names and values that a function takes from around it."""
    if isinstance(fn, functools.partial):
        yield from ((f"argument {i}", value) for i, value in enumerate(fn.args))
        yield from fn.keywords.items()
        fn = fn.func
    if isinstance(fn, types.FunctionType):
        found = inspect.getclosurevars(fn)
        yield from found.nonlocals.items()
        yield from found.globals.items()
        yield from ((f"a default of {name_of(fn)}", value) for value in fn.__defaults__ or ())


def _bad_xs(step: Callable, xs: Any, need: str) -> NoReturn:
    raise ShapeError(
        f"{name_of(step)}: xs of wrong shapes",
        got=shapes_of(xs) or "no tensor",
        need=need,
        from_=users_line(),
        fix="what all tokens share goes to params=",
    )
