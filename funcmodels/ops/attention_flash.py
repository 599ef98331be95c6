"""Flash attention on NVIDIA GPUs, dense and packed: torch's own, and that of the package.

Both take (n, seq, heads, d), or (tokens, heads, d) with the places where documents begin.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmodels.ops.attention_documents import documents
from funcmodels.ops.attention_flex import FLEX
from funcmodels.ops.attention_heads import HALVES, fold, unfold
from funcmodels.ops.attention_kernel import Call, Kernel
from funcmodels.ops.attention_opaque import opaque
from funcmodels.ops.attention_reference import Inputs, Rules
from funcmodels.ops.attention_sinks import add_sinks, sinks_grad


class Layout(NamedTuple):
    """What both libraries are told besides the tensors."""

    rules: Rules
    starts: Tensor | None  # (documents + 1,) int32 where packed
    longest: int  # tokens

    @property
    def window(self) -> tuple[int | None, int | None]:
        """How many tokens before and after itself a query sees; None: all of them."""
        size = None if self.rules.window is None else self.rules.window - 1
        return size, 0 if self.rules.causal else size


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, at: Layout) -> tuple[Tensor, Tensor]:
    left, right = at.window
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, at.starts, at.starts, at.longest, at.longest, 0.0, at.rules.causal, False,
        scale=at.rules.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, lse


def _torch_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                    at: Layout) -> tuple[Tensor, ...]:  # fmt: skip
    left, right = at.window
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, at.starts, at.starts, at.longest, at.longest, 0.0,
        at.rules.causal, no_dropout, no_dropout[0],
        scale=at.rules.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip


@cache
def _package() -> Any:
    """flash-attn 4's kernels. torch.nn.attention calls these two functions of it as well."""
    return importlib.import_module("flash_attn.cute.interface")


def _options(at: Layout) -> dict[str, Any]:
    left, right = at.window
    return {
        "softmax_scale": at.rules.scale,
        "causal": at.rules.causal and left is None,
        "window_size_left": left,
        "window_size_right": None if left is None else right,
        "cu_seqlens_q": at.starts,
        "cu_seqlens_k": at.starts,
        "max_seqlen_q": None if at.starts is None else at.longest,
        "max_seqlen_k": None if at.starts is None else at.longest,
    }


def _package_forward(q: Tensor, k: Tensor, v: Tensor, at: Layout) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _package()._flash_attn_fwd(
        q, k, v, softcap=at.rules.softcap, return_lse=True, **_options(at)
    )
    return out, lse


def _package_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                      at: Layout) -> tuple[Tensor, ...]:  # fmt: skip
    return _package()._flash_attn_bwd(
        q, k, v, out, grad, lse, softcap=at.rules.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(), **_options(at),
    )[:3]  # fmt: skip


def _forward(run: Callable[..., Any], sizes: Sequence[int], call: Call) -> tuple[Tensor, Tensor]:
    x, segment_ids, _ = call
    batch, seq, heads = x.q.shape[:-3], x.q.shape[-3], x.q.shape[-2]
    at = _layout(call)
    if at is None:
        return _without_documents(call).forward(call)
    width = _width(x, sizes)
    q, k, v = (_tokens(t, width, at) for t in x[:3])
    out, lse = run(q, k, v, at)
    if segment_ids is not None:  # (heads, tokens)
        lse = lse.unflatten(-1, (-1, seq)).transpose(0, 1)
    lse = lse.reshape(*batch, heads, seq)
    return add_sinks(unfold(out, x.q, x.v.shape[-1]), lse, x.sinks)


def _backward(
    run: Callable[..., Any],
    sizes: Sequence[int],
    call: Call,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
) -> Inputs:
    x, segment_ids, _ = call
    at = _layout(call)
    if at is None:
        return _without_documents(call).backward(call, grad_out, out, lse)
    width = _width(x, sizes)
    grad, result = (_tokens(t.to(x.q.dtype).contiguous(), width, at) for t in (grad_out, out))
    q, k, v = (_tokens(t, width, at) for t in x[:3])
    flat = lse.reshape(-1, *lse.shape[-2:])  # (n, heads, seq)
    if segment_ids is not None:
        flat = flat.transpose(0, 1).flatten(1)  # (heads, tokens)
    grads = run(grad, q, k, v, result, flat.contiguous(), at)
    q, k, v = (unfold(g, t, t.shape[-1]) for g, t in zip(grads, x[:3], strict=True))
    return Inputs(q, k, v, sinks_grad(x, grad_out, out, lse), None)


def _layout(call: Call) -> Layout | None:
    """Dense, or where documents begin; None if they are no runs of tokens."""
    x, segment_ids, rules = call
    if segment_ids is None:
        return Layout(rules, None, x.q.shape[-3])
    found = documents(segment_ids, x.q.shape[:-3])
    return None if found is None else Layout(rules, found.starts, found.longest)


def _without_documents(call: Call) -> Kernel:
    """The kernel that masks by id."""
    lacks = FLEX.lacks(call)
    assert lacks is None, f"flex lacks {lacks}, which flash attention has"
    return FLEX


def _width(x: Inputs, sizes: Sequence[int]) -> int:
    """The one head size that q, k and v are given: the least of a kernel's that is enough."""
    return next(n for n in sizes if n >= max(x.q.shape[-1], x.v.shape[-1]))


def _tokens(t: Tensor, width: int, at: Layout) -> Tensor:
    t = fold(t, width)
    return t if at.starts is None else t.flatten(0, 1)


def _lacks(call: Call) -> str | None:
    """What neither library has."""
    x = call.x
    if x.q.device.type != "cuda":
        return f"the device {x.q.device.type}"
    if x.q.dtype not in HALVES:
        return str(x.q.dtype)
    if x.slopes is not None:
        return "alibi_slopes"
    if max(x.q.shape[-1], x.v.shape[-1]) > 256:
        return "heads wider than 256"
    return "a sequence of no tokens" if x.q.shape[-3] == 0 else None


def _torch_lacks(call: Call) -> str | None:
    lacks = _lacks(call)
    if lacks is None and not torch.backends.cuda.is_flash_attention_available():
        return "a torch that was built with it"
    if lacks is None and torch.cuda.get_device_capability(call.x.q.device) < (8, 0):
        return "GPUs before Ampere"
    return lacks or ("softcap" if call.rules.softcap is not None else None)


def _package_lacks(call: Call) -> str | None:
    lacks = _lacks(call)
    if lacks is None and not _is_installed():
        return "the package flash-attn-4"
    if lacks is None and torch.cuda.get_device_capability(call.x.q.device)[0] != 9:
        return "GPUs other than Hopper, on which it was not run yet"
    return lacks


@cache
def _is_installed() -> bool:
    return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None


TORCH_SIZES = range(8, 257, 8)
# Those it was checked with: it runs with multiples of 8, and was wrong with 72 and 40 on Hopper.
PACKAGE_SIZES = (64, 128, 256)

FLASH = opaque(
    Kernel(
        "flash",
        _torch_lacks,
        partial(_forward, _torch_forward, TORCH_SIZES),
        partial(_backward, _torch_backward, TORCH_SIZES),
    )
)
FLASH_ATTN = opaque(
    Kernel(
        "flash_attn",
        _package_lacks,
        partial(_forward, _package_forward, PACKAGE_SIZES),
        partial(_backward, _package_backward, PACKAGE_SIZES),
    )
)
