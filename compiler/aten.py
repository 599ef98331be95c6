"""Operations of aten, as torch.func's transforms leave them -> the torch functions of the rules.

Below a `vmap` nothing is left of what the user wrote but operations of aten on whole tensors. Where
one is also a torch function that the compiler knows, it becomes that; any other stays as it is,
which runs as well, without a sharding rule.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from compiler import refuse
from compiler.rules import RULES
from funcmodels import ops

Call = tuple[Any, tuple[Any, ...], dict]

# What says where and how a result lies in memory, and nothing of its values.
_LAYOUT = ("device", "layout", "pin_memory", "memory_format", "implicit", "non_blocking")
_same = {"alias", "clone", "detach", "contiguous", "lift_fresh", "lift"}
_RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
_PRODUCTS = {"mm", "bmm", "mv", "dot", "matmul"}
# Functions of torch.nn.functional that take their arguments as aten does.
_FUNCTIONAL = {"silu", "gelu", "softplus", "leaky_relu", "mish", "hardtanh", "hardswish",
               "hardsigmoid", "relu6"}  # fmt: skip
# What they make is the same on every rank, and needs no rule.
_FACTORIES = {"arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices"}
_METHODS = {"repeat", "expand", "unfold", "new_zeros", "new_ones", "new_full"}


def same(x: Tensor) -> Tensor:
    """Stands for what gives its input back, as far as values go."""
    return x


def as_torch(func: OpOverload, args: Any, kwargs: dict, out: Any) -> Call:
    """The torch function that an operation of aten is, where there is one that is known.

    Args:
        func, args, kwargs: the operation; numbers that torch has made tensors of are numbers.
        out: its result.
    """
    name = func.overloadpacket.__name__
    if not isinstance(args[0], (Tensor, list, tuple)) and isinstance(out, Tensor) and not out.ndim:
        return torch.full, ((), args[0]), {"dtype": out.dtype}  # a number on its way
    if name in _same or (name == "_to_copy" and kwargs.get("dtype") is None):
        return same, args[:1], {}
    if name.endswith("_"):
        return _in_place(name, args, out)
    said = {k: v for k, v in kwargs.items() if k not in _LAYOUT}
    if name in _RESHAPES and not isinstance(args[1], torch.dtype):
        return torch.reshape, (args[0], tuple(args[1])), {}
    if name in _PRODUCTS:
        return torch.matmul, args, {}
    if name == "_to_copy":
        return Tensor.to, (args[0], said["dtype"]), {}
    if name == "t":
        return _t(args[0])
    if name == "select":
        return operator.getitem, (args[0], _along(args[0], args[1], args[2])), {}
    if name in ("ones_like", "zeros_like") and not out.ndim:  # of a number, and not of what it is
        return torch.full, ((), float(name == "ones_like")), {"dtype": out.dtype}
    if name == "slice":
        return operator.getitem, (args[0], _along(args[0], _at(args, 1, 0), _slice(args))), {}
    if name == "index":
        return _index(*args)
    if name == "embedding":
        return ops.embed, (args[1], args[0]), {}
    if name in ("_softmax", "_log_softmax") and not args[2]:
        return getattr(torch, name[1:]), args[:2], {}
    if name == "split_with_sizes":
        return torch.split, args, said
    if name == "scalar_tensor":
        return torch.full, ((), *args), said
    if func in (torch.ops.aten.max.other, torch.ops.aten.min.other):
        return (torch.maximum if name == "max" else torch.minimum), args, {}
    if name in _METHODS:
        return getattr(Tensor, name), args, said
    known = getattr(F, name) if name in _FUNCTIONAL else getattr(torch, name, None)
    if known in RULES or name in _FACTORIES:
        return known, args, said
    return func, args, said


def _in_place(name: str, args: tuple, out: Tensor) -> Call:
    """Other sizes of a tensor of torch's own; nothing else is written in place here."""
    if name not in ("squeeze_", "unsqueeze_"):
        raise refuse.written_below(name)
    return torch.reshape, (args[0], tuple(out.shape)), {}


def _t(x: Tensor) -> Call:
    if x.ndim < 2:
        return torch.reshape, (x, tuple(x.shape)), {}
    return torch.transpose, (x, 0, 1), {}


def _at(args: tuple, i: int, default: Any) -> Any:
    return args[i] if len(args) > i else default


def _along(x: Tensor, dim: int, index: Any) -> tuple:
    """An index of one dim as `x[...]` takes it."""
    return (*[slice(None)] * (dim % x.ndim), index)


def _slice(args: tuple) -> slice:
    start, end, step = _at(args, 2, None), _at(args, 3, None), _at(args, 4, 1)
    whole = isinstance(end, int) and end == sys.maxsize
    return slice(start or None, None if whole else end, None if step == 1 else step)


def _index(x: Tensor, indices: list) -> Call:
    if len(indices) == 1 and x.ndim == 2 and indices[0].dtype in (torch.int64, torch.int32):
        return ops.embed, (indices[0], x), {}
    return operator.getitem, (x, tuple(slice(None) if i is None else i for i in indices)), {}
