"""What the functions of a recurrence return: a state as declared, and a result for each token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from funcmodels import tree
from funcmodels.errors import ShapeError, listed
from funcmodels.source import SourceLine, users_line
from funcmodels.state import State

PRIMES = (1009, 1013, 1019)  # batch sizes that no other dim has


def check_pair(step: Callable, result: Any) -> None:
    """A step returns a state and something else.

    Raises:
        ShapeError: it returns no pair.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise ShapeError(
            f"{name_of(step)} returns no pair",
            got=type(result).__name__,
            need="(state, y)",
            from_=line_of(step),
            fix="return {...}, y",
        )


def check_state(step: Callable, state: State, carry: Any, before: Any = None) -> None:
    """A state is as declared, and of the shapes that it had before.

    Raises:
        ShapeError: other names, shapes or dtypes.
    """
    if not isinstance(carry, dict) or carry.keys() != state.slots.keys():
        raise ShapeError(
            f"{name_of(step)} returns another state than it is given",
            got=", ".join(carry) if isinstance(carry, dict) else type(carry).__name__,
            need=f"a dict of {', '.join(state.slots)}",
            declared=state.where,
            from_=line_of(step),
            fix="return (state, y), the state with all its tensors",
        )
    for name, slot in state.slots.items():
        value = carry[name]
        if not isinstance(value, Tensor):
            raise ShapeError(
                f'{name_of(step)} returns no tensor as the state "{name}"',
                got=repr(value),
                need=f"(*batch, {', '.join(map(str, slot.shape))}) {slot.dtype}, as declared",
                declared=state.where,
                from_=line_of(step),
                fix=f'torch.full_like(state["{name}"], ...)',
            )
        tail = tuple(value.shape[value.ndim - len(slot.shape) :])
        wrong_batch = before is not None and value.shape != before[name].shape
        if tail == slot.shape and value.dtype == slot.dtype and not wrong_batch:
            continue
        kind = "dtype" if tail == slot.shape and not wrong_batch else "shape"
        raise ShapeError(
            f'{name_of(step)} changes the {kind} of the state "{name}"',
            got=f"{_shape(value)} {value.dtype}",
            need=f"(*batch, {', '.join(map(str, slot.shape))}) {slot.dtype}, as declared",
            declared=state.where,
            from_=line_of(step),
            fix=f'"{name}": (...).to({slot.dtype})'
            if kind == "dtype"
            else "an update of the state's own shape",
        )


def check_results(fn: Callable, y: Any, batch: tuple[int, ...], n: int | None = None) -> None:
    """Results are tensors, one for each sequence of a batch; of a chunk, for each of its n tokens.

    Raises:
        ShapeError: something that is no tensor, or of another number.
    """
    lead = batch if n is None else (*batch, n)
    for path, leaf in tree.items(y):
        if not isinstance(leaf, Tensor):
            raise ShapeError(
                f"{name_of(fn)}: a result is no tensor",
                got=f"{path or 'y'} is {leaf!r}",
                need="a pytree of tensors",
                from_=line_of(fn),
                fix="leave it out of y" if leaf is None else "torch.full_like(...)",
            )
        if leaf.shape[: len(lead)] != lead:
            raise not_of_all(fn, path, tuple(leaf.shape), n)


def not_of_all(fn: Callable, path: str, shape: tuple, n: object = None) -> ShapeError:
    """The refusal of a result that is not one for each sequence, or of a chunk for each token."""
    what = "sequences" if n is None else "tokens"
    return ShapeError(
        f"{name_of(fn)}: a result {'' if n is None else 'of a chunk '}has another number of {what}",
        got=f"{path or 'y'} ({', '.join(map(str, shape))})",
        need="(*batch, ...)" if n is None else f"(*batch, {n}, ...)",
        from_=line_of(fn),
        fix="one result for each sequence: .expand of what all share"
        if n is None
        else "one result for each token, in the place of the token's dim",
    )


def check_alike(step: Callable, chunked: Callable, want: dict[str, Any], got: dict[str, Any]):
    """A chunked form's results are those of its step.

    Args:
        want, got: by path, the dtype and the shape of one token's results.
    Raises:
        ShapeError: another structure, or another dtype or shape.
    """

    def refused(what: str, got: str, need: str) -> ShapeError:
        return ShapeError(
            f"{name_of(chunked)} returns {what} than {name_of(step)}",
            got=got,
            need=need,
            step=line_of(step),
            from_=line_of(chunked),
            fix="the same y as the step's, with a dim for the tokens after the batch's",
        )

    if want.keys() != got.keys():
        names = [listed(path or "one tensor" for path in found) for found in (got, want)]
        raise refused("another y", *names)
    for path, kind in want.items():
        if got[path] != kind:
            shown = [
                f"{path or 'y'} of a token: {dtype} ({', '.join(map(str, shape))})"
                for dtype, shape in (got[path], kind)
            ]
            raise refused("another dtype or shape", *shown)


def check_combined(combine: Callable, result: Any, xs: Any) -> None:
    """What is combined is as what it is combined of.

    Raises:
        ShapeError: of another structure, shape or dtype.
    """
    want, got = dict(tree.items(xs)), dict(tree.items(result))
    for path in want | got:
        a, b = want.get(path), got.get(path)
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and _kind(a) == _kind(b)):
            raise ShapeError(
                f"{name_of(combine)} combines to something else than it is given",
                got=", ".join(f"{p or 'x'} {_described(x)}" for p, x in got.items()),
                need=", ".join(f"{p or 'x'} {_described(x)}" for p, x in want.items()),
                from_=line_of(combine),
                fix="a result of the structure, shapes and dtypes of each operand",
            )


def _kind(x: Tensor) -> tuple:
    return x.dtype, tuple(x.shape)


def _described(x: Any) -> str:
    return f"{_shape(x)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


@contextmanager
def shapes_said(step: Callable, state: State, xs: Any) -> Iterator[None]:
    """Let torch's own error about what a step does say which shapes it was given."""
    try:
        yield
    except RuntimeError as error:
        note = f"  in: {name_of(step)} of ops.recurrent, {line_of(step)}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
            slots = ", ".join(f"{name} {slot.shape}" for name, slot in state.slots.items())
            error.add_note(f"  got: a state of {slots}, declared {state.where}; xs {shapes_of(xs)}")
        raise


def shapes_of(xs: Any) -> str:
    return ", ".join(
        f"{path or 'x'} {tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__}"
        for path, leaf in tree.items(xs)
    )


def _shape(value: Tensor) -> str:
    sizes = ("batch" if isinstance(n, torch.SymInt) or n in PRIMES else str(n) for n in value.shape)
    return f"({', '.join(sizes)})"


def name_of(fn: Any) -> str:
    return getattr(getattr(fn, "func", fn), "__name__", repr(fn))


def line_of(fn: Any) -> SourceLine:
    fn = inspect.unwrap(fn)
    code = getattr(getattr(fn, "func", fn), "__code__", None)
    return SourceLine(code.co_filename, code.co_firstlineno, code.co_name) if code else users_line()
