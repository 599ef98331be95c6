"""Logits that are not computed yet, so that a loss can be taken of what they are made of.

Within `deferring`, `ops.unembed` returns `Deferred`: hidden states, a table, and what a model does
to its logits afterwards where `ops.cross_entropy` can do that too: factors, one tanh, casts to a
dtype that is wider. Anything else that is done with it is done with the logits, which are computed
then. So nothing is lost, whatever a model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree


class Steps(NamedTuple):
    """logits = before · z, or after · tanh(before · z); cast to dtype on the way."""

    before: float
    after: float | None
    dtype: torch.dtype


class Deferred:
    """The logits of (hidden, table) after some steps: for torch's functions, a tensor of them."""

    def __init__(
        self, hidden: Tensor, table: Tensor, steps: Steps, made: Callable[[], Tensor]
    ) -> None:
        self.hidden = hidden
        self.table = table
        self.steps = steps
        self.made = made

    def logits(self) -> Tensor:
        """The logits themselves, by the very calls that were put off."""
        with deferring(False):
            return self.made()

    def scale_and_softcap(self) -> tuple[float, float | None] | None:
        """The options of `ops.cross_entropy` that stand for the steps; None where none do."""
        before, after, _ = self.steps
        if after is None:
            return before, None
        return (before * after, after) if after > 0 else None

    def _with(self, step: Callable[[Tensor], Tensor], **steps: Any) -> Deferred:
        made = self.made
        return Deferred(self.hidden, self.table, self.steps._replace(**steps), lambda: step(made()))

    # What is put off

    def __mul__(self, other: Any) -> Any:
        return (
            self._times(other, lambda x: x * other) if _is_number(other) else self.logits() * other
        )

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if not _is_number(other) or other == 0:
            return self.logits() / other
        return self._times(1 / other, lambda x: x / other)

    def _times(self, factor: float, step: Callable[[Tensor], Tensor]) -> Deferred:
        before, after, _ = self.steps
        if after is None:
            return self._with(step, before=before * factor)
        return self._with(step, after=after * factor)

    def tanh(self) -> Any:
        return (
            self._with(torch.tanh, after=1.0) if self.steps.after is None else self.logits().tanh()
        )

    def float(self) -> Any:
        return self.to(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A cast to a dtype that loses nothing; all else is done with the logits."""
        dtype = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(dtype, torch.dtype) and dtype == torch.promote_types(dtype, self.steps.dtype):
            return self._with(lambda x: x.to(dtype), dtype=dtype)
        return self.logits().to(*args, **kwargs)

    # What is known already

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.table.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.steps.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    # What is not

    def __getattr__(self, name: str) -> Any:
        return getattr(self.logits(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = _OWN.get(func)
        if own is not None and args and isinstance(args[0], Deferred) and not kwargs:
            return own(*args)
        return func(*_computed(args), **_computed(kwargs))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _computed(values: Any) -> Any:
    return pytree.tree_map_only(Deferred, Deferred.logits, values)


_OWN: dict[Any, Callable] = {
    torch.mul: Deferred.__mul__,
    torch.div: Deferred.__truediv__,
    torch.tanh: Deferred.tanh,
    torch.nn.functional.tanh: Deferred.tanh,
}


def _by_operator(name: str) -> Callable:
    def operator(self: Deferred, *args: Any) -> Any:
        return getattr(self.logits(), name)(*_computed(args))

    return operator


# Python looks operators up on the class, past `__getattr__`.
_OPERATORS = (
    "add radd sub rsub rtruediv matmul rmatmul pow rpow mod floordiv neg pos abs invert "
    "eq ne lt le gt ge and or xor getitem len iter bool int float index"
)
for _name in _OPERATORS.split():
    setattr(Deferred, f"__{_name}__", _by_operator(f"__{_name}__"))
Deferred.__hash__ = object.__hash__  # type: ignore[method-assign]

_is_deferring = False
_level = 0


@contextmanager
def deferring(on: bool = True) -> Iterator[None]:
    """Let `ops.unembed` return `Deferred`, or, inside, not."""
    global _is_deferring, _level
    before, _is_deferring = (_is_deferring, _level), on
    _level = _depth()
    try:
        yield
    finally:
        _is_deferring, _level = before


def defer(hidden: Tensor, table: Tensor, unembed: Callable) -> Deferred | None:
    """The logits put off, where that is asked for; not inside a transform of the model's own."""
    if not _is_deferring or _depth() != _level:
        return None
    return Deferred(hidden, table, Steps(1.0, None, hidden.dtype), lambda: unembed(hidden, table))


def _depth() -> int:
    """How many transforms of torch.func are active."""
    if torch.compiler.is_compiling():
        return 0
    return functorch.maybe_current_level() or 0
