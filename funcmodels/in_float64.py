"""A function in float64, whatever dtypes it names: what differs then is a mistake, not rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_CASTS = {"float", "half", "bfloat16"}  # methods that name a dtype by being called


@contextmanager
def in_float64() -> Iterator[None]:
    """Casts to a floating dtype, and tensors made of one, are of float64 here."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widening():
            yield
    finally:
        torch.set_default_dtype(before)


class _Widening(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _CASTS:
            return Tensor.double(args[0])
        args, kwargs = pytree.tree_map_only(torch.dtype, wide, (args, kwargs or {}))
        return func(*args, **kwargs)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The widest dtype of a dtype's kind."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def widened(x: Any) -> Any:
    """A tensor in the widest dtype of its kind; anything else as it is."""
    return x.to(wide(x.dtype)) if isinstance(x, Tensor) else x
