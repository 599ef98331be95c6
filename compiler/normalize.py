"""One spelling for each operation: `x.view(...)`, `x + y`, `x.T` become the torch function.

So that a rule, a pass and an emitter meet each operation once. Every rewrite here gives the same
values; views become reshapes, since the graph is functional.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcmodels import ops
from funcmodels.ops import primitive

Call = tuple[Callable[..., Any], tuple[Any, ...], dict]

_BINARY = {
    "__add__": torch.add,
    "__sub__": torch.sub,
    "__mul__": torch.mul,
    "__truediv__": torch.div,
    "__div__": torch.div,
    "__pow__": torch.pow,
    "__matmul__": torch.matmul,
    "__floordiv__": torch.floor_divide,
    "__mod__": torch.remainder,
    "__and__": torch.bitwise_and,
    "__or__": torch.bitwise_or,
    "__xor__": torch.bitwise_xor,
    "__lshift__": torch.bitwise_left_shift,
    "__rshift__": torch.bitwise_right_shift,
    "__eq__": torch.eq,
    "__ne__": torch.ne,
    "__lt__": torch.lt,
    "__le__": torch.le,
    "__gt__": torch.gt,
    "__ge__": torch.ge,
}
_REVERSED = {
    "__radd__": torch.add,
    "__rsub__": torch.sub,
    "__rmul__": torch.mul,
    "__rtruediv__": torch.div,
    "__rdiv__": torch.div,
    "__rmatmul__": torch.matmul,
    "__rpow__": torch.pow,
    "__rfloordiv__": torch.floor_divide,
    "__rmod__": torch.remainder,
    "__rand__": torch.bitwise_and,
    "__ror__": torch.bitwise_or,
    "__rxor__": torch.bitwise_xor,
}
_SYNONYM = {
    "multiply": torch.mul,
    "subtract": torch.sub,
    "divide": torch.div,
    "true_divide": torch.div,
    "negative": torch.neg,
    "__neg__": torch.neg,
    "__invert__": torch.bitwise_not,
    "absolute": torch.abs,
    "swapaxes": torch.transpose,
    "swapdims": torch.transpose,
    "moveaxis": torch.movedim,
    "concat": torch.cat,
    "concatenate": torch.cat,
    "bmm": torch.matmul,
    "mm": torch.matmul,
    "mv": torch.matmul,
    "dot": torch.matmul,
    "amax": torch.amax,
    "amin": torch.amin,
    "data": torch.detach,
    "real": torch.real,
    "imag": torch.imag,
    "clip": torch.clamp,
    "fix": torch.trunc,
    "arcsin": torch.asin,
    "arccos": torch.acos,
    "arctan": torch.atan,
    "arctan2": torch.atan2,
    "arcsinh": torch.asinh,
    "arccosh": torch.acosh,
    "arctanh": torch.atanh,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "not_equal": torch.ne,
    "trapz": torch.trapezoid,
    "narrow_copy": torch.narrow,
    "split_with_sizes": torch.split,
    "unsafe_split_with_sizes": torch.split,
    "unsafe_split": torch.split,
    "unsafe_chunk": torch.chunk,
    "inverse": torch.linalg.inv,
    "det": torch.linalg.det,
    "matrix_exp": torch.linalg.matrix_exp,
    "matrix_power": torch.linalg.matrix_power,
    "special_digamma": torch.digamma,
    "special_psi": torch.digamma,
    "special_gammaln": torch.lgamma,
    "special_polygamma": torch.polygamma,
    "special_i0": torch.i0,
    "special_expit": torch.sigmoid,
    "special_exp2": torch.exp2,
    "special_expm1": torch.expm1,
    "special_log1p": torch.log1p,
    "special_erf": torch.erf,
    "special_erfc": torch.erfc,
    "special_erfinv": torch.erfinv,
    "special_logit": torch.logit,
    "special_sinc": torch.sinc,
    "special_round": torch.round,
    "special_xlogy": torch.xlogy,
    "special_softmax": torch.softmax,
    "special_log_softmax": torch.log_softmax,
    "special_logsumexp": torch.logsumexp,
}
_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "int": torch.int32,
    "long": torch.int64,
    "bool": torch.bool,
}
# Functions of torch.nn.functional that are another function here.
_FUNCTIONAL = {F.sigmoid: torch.sigmoid, F.tanh: torch.tanh, F.relu: torch.relu}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Products of two tensors over dims of theirs -> which these are, where it is not said.
_SUMMED: dict[str, Any] = {"tensordot": 2, "outer": 0, "ger": 0, "inner": ([-1], [-1])}
# The dim along which they split, or put together what has it.
_SPLITS = {"vsplit": 0, "hsplit": 1, "dsplit": 2}
_STACKS = {"vstack": 0, "row_stack": 0, "column_stack": 1, "dstack": 2}
# Methods whose function takes the tensor second: x.where(condition, y).
_SECOND = {"where": ("condition", "other"), "polygamma": ("n",)}
_DEVIATIONS = {"var", "std", "var_mean", "std_mean"}
_TAKES_SIZES = {"reshape", "view", "permute", "expand", "repeat", "tile", "flip"}
_IDENTITY = {"contiguous", "clone", "requires_grad_", "alias", "cpu", "cuda"}
# Of one tensor, and nothing beside it: one that drops was refused before.
DROPOUT = re.compile(r"(feature_)?(alpha_)?dropout[123]?d?")
_DEVICE_READS = {
    "is_cuda": lambda device: device.type == "cuda",
    "is_cpu": lambda device: device.type == "cpu",
    "get_device": lambda device: -1 if device.type == "cpu" else device.index,
}


def is_identity(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether the operation gives its input back, as far as values go."""
    name = getattr(func, "__name__", "")
    if name == "to":  # a device alone: models are traced on none in particular
        given = (*args[1:], *kwargs.values())
        return not any(isinstance(v, (torch.dtype, Tensor)) for v in given)
    return name in _IDENTITY or DROPOUT.fullmatch(name) is not None


def where_it_is(func: Any) -> Callable[[torch.device], Any] | None:
    """For `is_cuda` and the like: what they say of a tensor on a device."""
    return _DEVICE_READS.get(_name(func))


def on_one_device(func: Any, args: Any, kwargs: dict, device: torch.device) -> tuple[Any, dict]:
    """A call with `device` in the place of every device that it names."""
    if "device" in kwargs:
        kwargs = {**kwargs, "device": device}
    if _name(func) == "to":
        args = tuple(device if isinstance(a, (str, torch.device)) else a for a in args)
    return (args[:1], {}) if _name(func) == "cuda" else (args, kwargs)


def normalize(func: Any, args: tuple[Any, ...], kwargs: dict) -> Call:
    """The one spelling of a call that a TorchFunctionMode sees."""
    name = _name(func)
    args, kwargs = _in_place_of_names(func, name, args, _said(func, kwargs))
    if name in _SECOND and func is getattr(Tensor, name):
        x, first, *rest = (*args, *(kwargs[k] for k in _SECOND[name] if k in kwargs))
        return getattr(torch, name), (first, x, *rest), {}
    if name in _DEVIATIONS and len(args) == 2 and isinstance(args[1], bool):
        return _as_torch(func, name), args[:1], {**kwargs, "correction": int(args[1])}
    if name in _TAKES_SIZES:
        args = _packed(args)
    if name in _REVERSED:
        return _REVERSED[name], (args[1], args[0]), {}
    if name in _BINARY:
        return _BINARY[name], args, kwargs
    if name in _SYNONYM:
        return _SYNONYM[name], args, kwargs
    if name in ("__getitem__", "getitem"):
        if _is_lookup(*args):
            return ops.embed, (args[1], args[0]), {}
        return operator.getitem, args, {}
    if name in ("view", "reshape"):
        shape = args[1] if len(args) > 1 else next(iter(kwargs.values()))
        if isinstance(shape, torch.dtype):
            return func, args, kwargs
        return torch.reshape, (*args[:1], tuple(shape)), {}
    if name in ("view_as", "reshape_as"):
        return torch.reshape, (args[0], tuple(args[1].shape)), {}
    if name in ("expand", "expand_as", "broadcast_to"):
        x, sizes = (*args[:2], *kwargs.values())[:2]
        sizes = sizes.shape if isinstance(sizes, Tensor) else sizes
        return Tensor.expand, (x, tuple(sizes)), {}
    if name in ("T", "mT", "t"):
        dims = args[0].ndim
        return (
            (torch.transpose, (args[0], dims - 2, dims - 1), {})
            if dims > 1
            else (torch.reshape, (args[0], tuple(args[0].shape)), {})
        )
    if name == "tile":
        times = tuple(args[1])
        return Tensor.repeat, (args[0], (1,) * (args[0].ndim - len(times)) + times), {}
    if name in ("fliplr", "flipud"):
        return torch.flip, (args[0], (int(name == "fliplr"),)), {}
    if name == "ravel":
        return torch.reshape, (args[0], (-1,)), {}
    if name == "linalg_norm" and isinstance(dim := _given(args, 2, kwargs, "dim"), int):
        order = _given(args, 1, kwargs, "ord")
        kept = {"keepdim": _given(args, 3, kwargs, "keepdim") or False}
        if "dtype" not in kwargs:
            return torch.linalg.vector_norm, (args[0], 2 if order is None else order, dim), kept
    if name == "hstack":
        return torch.cat, (args[0], min(args[0][0].ndim, 2) - 1), {}
    if name in _STACKS and args[0][0].ndim > (dim := _STACKS[name]):
        return torch.cat, (args[0], dim), {}
    if name in _SPLITS:
        (at,) = (*args[1:], *kwargs.values())
        return torch.tensor_split, (args[0], at, min(_SPLITS[name], args[0].ndim - 1)), {}
    if name in _CASTS:
        return Tensor.to, (args[0], _CASTS[name]), {}
    if name in ("to", "type", "type_as"):
        return _cast(func, args, kwargs)
    if name in _SUMMED and (equation := _equation(name, args, kwargs)):
        return torch.einsum, (equation, *args[:2]), {}
    if func is F.embedding and len(args) == 2 and not kwargs:
        return ops.embed, args, {}
    if func is F.softmax:
        return _softmax(args, kwargs)
    if func in _FUNCTIONAL:
        return _FUNCTIONAL[func], args[:1], {}
    return _as_torch(func, name), args, kwargs


def _given(args: tuple, i: int, kwargs: dict, name: str) -> Any:
    return args[i] if len(args) > i else kwargs.get(name)


def _name(func: Any) -> str:
    """The operation's name; of an attribute's getter, the attribute's."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return getattr(func.__self__, "__name__", name)
    return name


_ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "cat": ("tensors",),
    "stack": ("tensors",),
    "hstack": ("tensors",),
    "tile": ("input", "dims"),
    "tensordot": ("a", "b"),
    "outer": ("input", "vec2"),
    "mv": ("input", "vec"),
    "dot": ("input", "tensor"),
    "mm": ("input", "mat2"),
    "bmm": ("input", "mat2"),
    "addmm": ("input", "mat1", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
    "cdist": ("x1", "x2"),
    "isin": ("elements", "test_elements"),
    "searchsorted": ("sorted_sequence", "input"),
    "group_norm": ("input", "num_groups", "weight", "bias"),
    "select_scatter": ("input", "src"),
    "slice_scatter": ("input", "src"),
    "index_add": ("input", "dim", "index", "source"),
    "index_copy": ("input", "dim", "index", "source"),
    "index_reduce": ("input", "dim", "index", "source"),
    "index_fill": ("input", "dim", "index", "value"),
    "vstack": ("tensors",),
    "dstack": ("tensors",),
    "column_stack": ("tensors",),
    "where": ("condition", "input", "other"),
    "scaled_dot_product_attention": ("query", "key", "value"),
    "linalg_solve": ("A", "B"),
    "linalg_solve_triangular": ("A", "B"),
    "linalg_vecdot": ("x", "y"),
    "trapezoid": ("y", "x"),
    "trapz": ("y", "x"),
    "cumulative_trapezoid": ("y", "x"),
    "cosine_similarity": ("x1", "x2"),
    "pairwise_distance": ("x1", "x2"),
}
# What torch's own functions take under numpy's names too.
_NUMPY = {
    "axis": "dim", "keepdims": "keepdim", "axis0": "dim0", "axis1": "dim1", "x": "input",
    "a": "input", "x1": "input", "x2": "other",
}  # fmt: skip


def _in_place_of_names(func: Any, name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Tensors by position, however they were given: `matmul(x, other=y)` as `matmul(x, y)`.

    And other arguments by torch's names: `cat(xs, axis=1)` as `cat(xs, dim=1)`.
    """
    if func in primitive.ALL.values():
        bound = _signature(func).bind(*args, **kwargs)
        return bound.args, bound.kwargs
    names = _ARGUMENTS.get(name, ("input", "other"))
    if not isinstance(func, FunctionType):
        kwargs = {k if k in names else _NUMPY.get(k, k): v for k, v in kwargs.items()}
    kwargs = dict(kwargs)
    for argument in names[len(args) :]:
        if argument not in kwargs:
            break
        args = (*args, kwargs.pop(argument))
    return args, kwargs


@functools.lru_cache(maxsize=512)
def _signature(func: FunctionType) -> inspect.Signature:
    return inspect.signature(func)


def _said(func: Any, kwargs: dict) -> dict:
    """The keyword arguments without those that only repeat the function's defaults.

    And without a device: all that a program makes lies where its inputs do.
    """
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    if not kwargs or not isinstance(func, FunctionType):
        return kwargs
    defaults = _defaults(func)
    return {k: v for k, v in kwargs.items() if k not in defaults or defaults[k] is not v}


@functools.lru_cache(maxsize=512)
def _defaults(func: FunctionType) -> dict[str, Any]:
    parameters = _signature(func).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _is_lookup(x: Any, index: Any) -> bool:
    """Whether `x[index]` takes rows of a matrix by their numbers."""
    if not isinstance(index, Tensor) or x.ndim != 2:
        return False
    return index.dtype in (torch.int64, torch.int32) and index.ndim > 0


def _equation(name: str, args: tuple, kwargs: dict) -> str | None:
    """Two tensors and the dims that they are summed over, as einsum's letters; None if unclear."""
    if len(args) < 2 or "out" in kwargs:
        return None
    a, b = args[:2]
    dims = kwargs.get("dims", args[2] if len(args) > 2 else _SUMMED[name])
    if isinstance(dims, int):
        dims = (range(-dims, 0), range(dims))
    if isinstance(dims, Tensor) or 0 in (a.ndim, b.ndim):
        return None
    pairs = [(i % a.ndim, j % b.ndim) for i, j in zip(*dims, strict=True)]
    if any(type(a.shape[i]) is not int or a.shape[i] != b.shape[j] for i, j in pairs):
        return None  # of a size of 1 beside another, einsum knows nothing
    left, right = _LETTERS[: a.ndim], list(_LETTERS[a.ndim : a.ndim + b.ndim])
    for i, j in pairs:
        right[j] = left[i]
    out = [c for c in left if c not in right] + [c for c in right if c not in left]
    return f"{left},{''.join(right)}->{''.join(out)}"


def _as_torch(func: Any, name: str) -> Any:
    """`torch.name` for a Tensor method that torch also has as a function."""
    method = getattr(Tensor, name, None)
    if method is func or type(func).__name__ in ("method_descriptor", "wrapper_descriptor"):
        function = getattr(torch, name, None)
        return function if callable(function) else func
    if getattr(func, "__module__", "") == "torch._tensor":
        return getattr(torch, name, func)
    return func


def _packed(args: tuple) -> tuple:
    """`x.view(2, 3)` as `x.view((2, 3))`."""
    if len(args) > 1 and not isinstance(args[1], (tuple, list, torch.dtype)):
        return (args[0], tuple(args[1:]))
    return args


def _softmax(args: tuple[Any, ...], kwargs: dict) -> Call:
    """F.softmax(x, dim, _stacklevel, dtype) as torch.softmax(x, dim, dtype)."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dtype = kwargs.get("dtype", args[3] if len(args) > 3 else None)
    return torch.softmax, (*args[:1], dim), {} if dtype is None else {"dtype": dtype}


def _cast(func: Any, args: tuple[Any, ...], kwargs: dict) -> Call:
    """Casts to a dtype, with a device or without; what else `.to` could mean is left as it is."""
    for other in (*args[1:], *kwargs.values()):
        if isinstance(other, Tensor):
            other = other.dtype
        if isinstance(other, torch.dtype):
            return Tensor.to, (*args[:1], other), {}
    return func, args, kwargs
