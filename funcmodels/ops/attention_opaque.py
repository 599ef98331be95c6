"""A kernel as two operators that tracers record whole, so that it may do anything inside.

AOTAutograd sees `funcmodels::flash_forward` and its shapes; a kernel may read from the device, be
compiled on first use, or be Python from another package. The operators for packed sequences are
marked as unsafe in CUDA graphs, so that Inductor replays what is before and after them only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcmodels.ops.attention_kernel import Call, Kernel
from funcmodels.ops.attention_reference import Inputs, Rules

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? slopes, Tensor? segment_ids, "
    "bool causal, float scale, int? window, float? softcap, str? kernel"
)


def opaque(kernel: Kernel) -> Kernel:
    """The kernel, called through operators of its name."""
    forwards, backwards = {}, {}
    for packed in (False, True):
        name = f"funcmodels::{'packed_' * packed}{kernel.name}"
        tags = (torch.Tag.cudagraph_unsafe,) if packed else ()
        forwards[packed] = _define(
            f"{name}_forward",
            f"({_CALL}) -> (Tensor, Tensor)",
            tags,
            lambda *args: _dense(kernel.forward(_call(args))),
            _fake_forward,
        )
        backwards[packed] = _define(
            f"{name}_backward",
            f"({_CALL}, Tensor grad_out, Tensor out, Tensor lse) -> Tensor[]",
            tags,
            lambda *args: _dense(_present(kernel.backward(_call(args), *args[-3:]))),
            _fake_backward,
        )

    def forward(call: Call) -> tuple[Tensor, Tensor]:
        return forwards[call.segment_ids is not None](*call.x, call.segment_ids, *call.rules)

    def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor) -> Inputs:
        op = backwards[call.segment_ids is not None]
        q, k, v, *sinks = op(*call.x, call.segment_ids, *call.rules, grad_out, out, lse)
        return Inputs(q, k, v, sinks[0] if sinks else None, None)

    return Kernel(kernel.name, kernel.lacks, forward, backward)


def _define(
    name: str, schema: str, tags: tuple[Any, ...], fn: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """An operator without a rule of differentiation: `Attention` calls it where none is wanted.

    Not `torch.library.custom_op`: autograd is off inside, and FlexAttention's backward uses it.
    """
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    torch.library.impl(name, "CompositeExplicitAutograd", fn)
    torch.library.register_fake(name, fake)
    return getattr(torch.ops.funcmodels, name.removeprefix("funcmodels::")).default


def _call(args: tuple[Any, ...]) -> Call:
    return Call(Inputs(*args[:5]), args[5], Rules(*args[6:11]))


def _present(grads: Inputs) -> list[Tensor]:
    return [g for g in grads if g is not None]


def _dense(tensors: Any) -> Any:
    """Contiguous, as the fakes below promise; for most kernels no work."""
    return type(tensors)(t.contiguous() for t in tensors)


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    q, v = args[0], args[2]
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32)


def _fake_backward(*args: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in args[:4] if t is not None]
