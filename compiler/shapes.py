"""The results of whole ops, found by running them on meta tensors of example sizes.

With symbolic sizes each of the many operations inside an op, or an einsum, costs a millisecond of
symbolic algebra. These operations put the dims of tokens where they were, so that their results
are known from one run without symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

from compiler.ir import MODEL_DTYPE
from compiler.rules import letters_of
from funcmodels.ops import primitive

_FFTS = [getattr(torch.fft, name) for name in torch.fft.__all__ if "freq" not in name]
_OPS = frozenset(primitive.ALL.values())
# Which for symbolic sizes torch fixes, or is slow.
_OF_NUMBERS = (
    F.pad, torch.complex, torch.polar, torch.take_along_dim, F.interpolate, F.max_pool1d,
    F.local_response_norm, *_FFTS,
)  # fmt: skip
Sizes = tuple[Any, ...]


def result_of(func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """What `func` gives for fake tensors: for those that this file knows, without symbolic algebra.

    Raises what the function itself raises for shapes that do not fit.
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    halves = func in _FFTS and any(t.dtype == MODEL_DTYPE for t in tensors)  # which it refuses
    if (func in _OPS or func in _OF_NUMBERS) and not halves:
        lead = next((s for t in tensors if (s := _leading(t.shape))), ())
        if all(_leading(t.shape) in (lead, ()) for t in tensors):
            return _run(func, args, kwargs, lambda shape: _replaced(shape, lead))
    elif func is torch.einsum and isinstance(args[0], str) and len(tensors) == len(args) - 1:
        terms = letters_of(args[0], [t.ndim for t in tensors])
        if terms is not None:
            dims = _dims(terms, tensors)
            return _run(func, args, kwargs, lambda _: tuple(dims[c] for c in terms[-1]))
    elif func is torch.linalg.solve_triangular and len({t.ndim for t in tensors}) == 1:
        return _run(func, args, kwargs, lambda _: tuple(tensors[1].shape))
    return func(*args, **kwargs)


def _dims(terms: list[list[str]], tensors: list[Tensor]) -> dict[str, Any]:
    """The size of each letter; a dim of 1 gives way to another's, as in broadcasting."""
    dims: dict[str, Any] = {}
    for letters, tensor in zip(terms, tensors, strict=False):
        for letter, n in zip(letters, tensor.shape, strict=True):
            if letter not in dims or isinstance(n, torch.SymInt) or _example(dims[letter]) == 1:
                dims[letter] = n
    return dims


def _run(func: Any, args: tuple, kwargs: dict, shape_of: Callable[[Sizes], Sizes | None]) -> Any:
    given = pytree.tree_map_only(Tensor, _meta, (args, kwargs))
    with unset_fake_temporarily():
        out = func(*given[0], **given[1])
    shapes = [shape_of(tuple(t.shape)) for t in pytree.tree_leaves(out)]
    for shape, found in zip(shapes, pytree.tree_leaves(out), strict=True):
        if shape is None or tuple(map(_example, shape)) != tuple(found.shape):
            return func(*args, **kwargs)  # it moves the tokens' dims elsewhere
    known = iter(shapes)
    return pytree.tree_map(lambda t: torch.empty(next(known), dtype=t.dtype), out)  # type: ignore[arg-type]


def _meta(tensor: Tensor) -> Tensor:
    with unset_fake_temporarily():
        return torch.empty(tuple(map(_example, tensor.shape)), dtype=tensor.dtype, device="meta")


def _example(n: Any) -> int:
    return n.node.hint if isinstance(n, torch.SymInt) else n


def _leading(shape: Sizes) -> Sizes:
    """The dims up to the last symbolic one."""
    last = max((i for i, n in enumerate(shape) if isinstance(n, torch.SymInt)), default=-1)
    return tuple(shape[: last + 1])


def _replaced(shape: Sizes, lead: Sizes) -> Sizes | None:
    return (*lead, *shape[len(lead) :]) if len(shape) >= len(lead) else None
