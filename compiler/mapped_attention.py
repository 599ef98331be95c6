"""`ops.attention` inside a vmap: one call, whose heads are those of every mapped function.

torch would leave the operations of a kernel, which no rule knows, and no layer of the engine's is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

functorch: Any = torch._C._functorch  # type: ignore[attr-defined]

# (q, k, v, settings) of plain tensors -> the result, written down.
Call = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def only_maps() -> bool:
    """Whether every transform that is at work is a vmap."""
    kinds = {level.key() for level in functorch.get_interpreter_stack() or ()}
    return kinds == {functorch.TransformType.Vmap}


def mapped(call: Call, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    """Attention of a vmap's tensors: the mapped dim joins the heads, or the batch if a symbol."""
    if functorch.peek_interpreter_stack() is None:
        return call(q, k, v, settings)
    level = functorch.peek_interpreter_stack().level()
    tensors = {"q": q, "k": k, "v": v, **settings}
    found = {n: functorch._unwrap_batched(t, level) if isinstance(t, Tensor) else (t, None)
             for n, t in tensors.items()}  # fmt: skip
    size = next((t.shape[at] for t, at in found.values() if at is not None), None)
    with retrieve_current_functorch_interpreter().lower():
        if size is None:
            return mapped(call, q, k, v, **settings)
        by_heads = isinstance(size, int) and found.get("segment_ids", (None, None))[1] is None
        if by_heads:
            given = {n: _beside_heads(n, t, at, size) for n, (t, at) in found.items()}
            out = mapped(call, **given)
            out = out.unflatten(-2, (size, out.shape[-2] // size)).movedim(-3, 0)
        else:
            out = mapped(call, **{n: _in_front(n, t, at, size) for n, (t, at) in found.items()})
    return functorch._add_batch_dim(out, 0, level)


def _beside_heads(name: str, value: Any, at: int | None, size: int) -> Any:
    """Each head once for every call, the calls in the outer place: so keys stay their queries'."""
    if name == "alibi_slopes" and value is not None and not isinstance(value, Tensor):
        return tuple(value) * size
    if not isinstance(value, Tensor) or name == "segment_ids":
        return value
    whole = value.expand(size, *value.shape) if at is None else value.movedim(at, 0)
    if name in ("q", "k", "v"):
        return whole.movedim(0, -3).flatten(-3, -2)
    return whole.flatten()


def _in_front(name: str, value: Any, at: int | None, size: Any) -> Any:
    """The mapped dim as a batch's, of what has one."""
    if not isinstance(value, Tensor) or (name not in ("q", "k", "v", "segment_ids") and at is None):
        return value
    return value.expand(size, *value.shape) if at is None else value.movedim(at, 0)
