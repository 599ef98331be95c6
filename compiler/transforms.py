"""`torch.func` transforms and `torch.utils.checkpoint` inside a model, while it is traced.

A transform shows the user's function other tensors than those that the program is made of. What it
makes of them reaches torch as operations on whole tensors, and there they are written down. So a
`vmap` over heads is a product with a batch dim, which is cut by heads as any other is.

Checkpointing is about memory in training alone: the function is called, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from torch import Tensor
from torch._functorch import apis, eager_transforms
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter,
    temporarily_clear_interpreter_stack,
)
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from compiler import refuse

functorch: Any = torch._C._functorch  # type: ignore[attr-defined]

# (func of aten, args, kwargs) -> its result, written down.
Record = Callable[[Any, tuple, dict], Any]

# Where transforms begin, however a user has imported them.
_BEGINNINGS = (
    (apis, "vmap_impl"),
    (eager_transforms, "grad_impl"),
    (eager_transforms, "grad_and_value_impl"),
    (eager_transforms, "_jvp_with_argnums"),
)
# Those whose second half the user calls later, when what was transformed is gone.
_HALVES = ((eager_transforms, "_vjp_with_argnums"), (eager_transforms, "linearize"))


def is_transforming() -> bool:
    """Whether a function runs inside a transform: its tensors are not the program's."""
    return functorch.peek_interpreter_stack() is not None


class Below(TorchDispatchMode):
    """Sees what a transform makes of a function: operations of aten on whole tensors."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.is_listening = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_listening:
            return self.record(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextmanager
def outside(below: Below) -> Iterator[None]:
    """As if no transform were at work, for what depends on none of its tensors."""
    below.is_listening = False
    try:
        with temporarily_clear_interpreter_stack():
            yield
    finally:
        below.is_listening = True


def call(func: Any, args: tuple, kwargs: dict) -> Any:
    """A function on a transform's tensors."""
    if func in (torch.cat, torch.concat, torch.concatenate, torch.stack):
        return _joined(func, *_parts_and_dim(*args, **kwargs))
    if func in _SPELLED and _is_differentiating():
        return _SPELLED[func](*args, **kwargs)
    return func(*args, **kwargs)


def _is_differentiating() -> bool:
    kinds = {level.key() for level in functorch.get_interpreter_stack() or ()}
    return bool(kinds & {functorch.TransformType.Grad, functorch.TransformType.Jvp})


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    """Its own derivative is written in place, as mish's."""
    return x * torch.sigmoid(x)


def _mish(x: Tensor, inplace: bool = False) -> Tensor:
    return x * torch.tanh(F.softplus(x))


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU of operations whose derivatives hold for any number of tokens: its own fixes that."""
    if approximate == "tanh":
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * torch.erfc(x * -math.sqrt(0.5))  # 1 + erf would cancel


def _log_sigmoid(x: Tensor) -> Tensor:
    """Its own derivative takes a buffer along, that is of no shape on a GPU."""
    return -F.softplus(-x)


def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """Its own derivative is written in place."""
    x = x if min is None else torch.where(x < min, min, x)
    return x if max is None else torch.where(x > max, max, x)


# While something is differentiated: what torch's own derivatives of cannot be recorded.
_SPELLED: dict[Any, Callable[..., Any]] = {
    F.silu: _silu, F.mish: _mish, F.gelu: _gelu, F.logsigmoid: _log_sigmoid,
    torch.clamp: _clamp, Tensor.clamp: _clamp, torch.clip: _clamp, Tensor.clip: _clamp,
}  # fmt: skip


def _basis(tensors: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, ...]:
    """The standard basis that jacfwd takes its columns along; torch's own is written in place."""
    parts = torch.eye(sum(counts)).split(list(counts), -1)
    return tuple(
        part.to(x.dtype).contiguous().reshape(-1, *x.shape)
        for part, x in zip(parts, tensors, strict=True)
    )


def _parts_and_dim(tensors: Any, dim: int = 0) -> tuple[list[Tensor], int]:
    return list(tensors), dim


def _joined(func: Any, parts: list[Tensor], dim: int) -> Tensor:
    """Tensors joined inside a vmap, for any number of tokens: torch's own rule fixes the number."""
    current = functorch.peek_interpreter_stack()
    if current is None or current.key() != functorch.TransformType.Vmap:
        return func(parts, dim)
    level = current.level()
    pairs = [functorch._unwrap_batched(part, level) for part in parts]
    size = next((t.shape[at] for t, at in pairs if at is not None), None)
    with retrieve_current_functorch_interpreter().lower():
        if size is None:
            return _joined(func, parts, dim)
        whole = [t.unsqueeze(0) if at is None else t.movedim(at, 0) for t, at in pairs]
        whole = [t.expand(size, *t.shape[1:]) for t in whole]
        out = _joined(func, whole, dim + 1 if dim >= 0 else dim)
    return functorch._add_batch_dim(out, 0, level)


@contextmanager
def recorded(tracer: TorchFunctionMode, mode: Below) -> Iterator[None]:
    """Let transforms that a traced function begins be recorded, and checkpoints be plain calls."""

    def listened(begin: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            # An op of ours may use a transform itself: the op is one node, and that is no part.
            if is_transforming() or tracer not in _get_current_function_mode_stack():
                return begin(*args, **kwargs)
            with mode:
                return begin(*args, **kwargs)

        return run

    def refused(begin: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if tracer not in _get_current_function_mode_stack():
                return begin(*args, **kwargs)
            raise refuse.transform(begin.__name__.strip("_").partition("_")[0])

        return run

    def basis(tensors: Sequence[Tensor], counts: Sequence[int]) -> Any:
        given = tracer in _get_current_function_mode_stack()
        return (_basis if given else torch_basis)(tensors, counts)

    torch_basis = eager_transforms._construct_standard_basis_for
    plain = SimpleNamespace(apply=lambda function, _, *args: function(*args))
    new = [(at, name, listened(getattr(at, name))) for at, name in _BEGINNINGS]
    new += [(at, name, refused(getattr(at, name))) for at, name in _HALVES]
    new += [(eager_transforms, "_construct_standard_basis_for", basis)]
    new += [(checkpointing, "CheckpointFunction", plain)]
    new += [(checkpointing, "_checkpoint_without_reentrant_generator", _no_checkpoint)]
    before = [(at, name, getattr(at, name)) for at, name, _ in new]
    for at, name, value in new:
        setattr(at, name, value)
    try:
        yield
    finally:
        for at, name, value in before:
            setattr(at, name, value)


def _no_checkpoint(*args: Any, **kwargs: Any) -> Iterator[None]:
    """What torch runs around a checkpointed function: nothing, before and after."""
    yield
