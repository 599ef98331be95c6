"""Attention's rules of differentiation and vectorisation, as two `torch.autograd.Function`s."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from funcmodels.ops import attention_kernels as kernels
from funcmodels.ops import attention_reference as reference
from funcmodels.ops.attention_reference import Inputs, Rules, Tangents
from funcmodels.ops.forward_mode import outer_tangents, values
from funcmodels.ops.function_rules import batched, is_last_derivative, no_view


class Attention(torch.autograd.Function):
    """out and lse of (q, k, v, sinks, slopes, segment_ids, *rules); lse has no derivative."""

    @staticmethod
    def forward(q, k, v, sinks, slopes, segment_ids, *rules):
        out, lse = kernels.forward(Inputs(q, k, v, sinks, slopes), segment_ids, Rules(*rules))
        return no_view(out), no_view(lse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, rules = inputs[:6], Rules(*inputs[6:])
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.save_for_forward(*tensors)
        ctx.rules = rules

    @staticmethod
    def backward(ctx, *grads):
        grad_out, _grad_lse = grads
        q, k, v, sinks, slopes, segment_ids, out, lse = ctx.saved_tensors
        slopes_grad = slopes is not None and ctx.needs_input_grad[4]
        if is_last_derivative():
            x = Inputs(q, k, v, sinks, slopes)
            grads = kernels.backward(
                x, grad_out, out, lse, segment_ids, ctx.rules, slopes_grad=slopes_grad
            )
            return (*grads, None, *[None] * len(ctx.rules))
        grads = AttentionGrad.apply(
            grad_out, q, k, v, sinks, slopes, segment_ids, out, lse, slopes_grad, *ctx.rules
        )
        grads = _spread(grads, sinks is not None, slopes_grad)
        return (*grads, None, *[None] * len(ctx.rules))

    @staticmethod
    def jvp(ctx, *tangents):
        *primals, segment_ids = ctx.saved_tensors
        with outer_tangents():
            x, t = Inputs(*values(primals)), Tangents(*values(tangents[:5]))
            return reference.jvp(x, t, segment_ids, ctx.rules), None

    @staticmethod
    def vmap(info, in_dims, *args):
        keep = (True, True, True, False, False, False)
        tensors = batched(args[:6], in_dims, info.batch_size, keep)
        return Attention.apply(*tensors, *args[6:]), (0, 0)


class AttentionGrad(torch.autograd.Function):
    """The gradients of <grad_out, out> by q, k, v, sinks if given, slopes if asked for.

    `out` and `lse` are only a help to the kernels: the derivatives below are those of the
    gradients as functions of grad_out, q, k, v, sinks and slopes, and out and lse have none.
    """

    @staticmethod
    def forward(
        grad_out, q, k, v, sinks, slopes, segment_ids, out, lse, slopes_grad, *rules
    ):  # fmt: skip
        x = Inputs(q, k, v, sinks, slopes)
        grads = kernels.backward(
            x, grad_out, out, lse, segment_ids, Rules(*rules), slopes_grad=slopes_grad
        )
        return tuple(map(no_view, _present(grads, sinks is not None, slopes_grad)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_out, q, k, v, sinks, slopes, segment_ids, _out, _lse, slopes_grad, *rules = inputs
        ctx.save_for_backward(grad_out, q, k, v, sinks, slopes, segment_ids)
        ctx.save_for_forward(grad_out, q, k, v, sinks, slopes, segment_ids)
        ctx.slopes_grad, ctx.rules = slopes_grad, Rules(*rules)

    @staticmethod
    def backward(ctx, *cotangents):
        grad_out, *x, segment_ids = ctx.saved_tensors
        x = Inputs(*x)
        t = Tangents(*_spread(cotangents, x.sinks is not None, ctx.slopes_grad))
        by_grad_out = reference.jvp(x, t, segment_ids, ctx.rules).to(grad_out.dtype)
        by_x = reference.second(x, t, grad_out, segment_ids, ctx.rules)
        return (by_grad_out, *by_x, *[None] * (4 + len(ctx.rules)))

    @staticmethod
    def jvp(ctx, *tangents):
        *primals, segment_ids = ctx.saved_tensors
        with outer_tangents():
            grad_out, *primals = values(primals)
            grad_out_t, *tangents = values(tangents[:6])
            x, t = Inputs(*primals), Tangents(*tangents)
            present = x.sinks is not None, ctx.slopes_grad
            curved = reference.second(x, t, grad_out, segment_ids, ctx.rules)
            if grad_out_t is None:
                return _present(curved, *present)
            linear = reference.vjp(x, grad_out_t, segment_ids, ctx.rules)
            pairs = zip(_present(curved, *present), _present(linear, *present), strict=True)
            return tuple(a + b for a, b in pairs)

    @staticmethod
    def vmap(info, in_dims, *args):
        slopes_grad = args[9]  # a gradient per sample needs the argument per sample
        keep = (True, True, True, True, True, slopes_grad, False, True, True)
        tensors = batched(args[:9], in_dims, info.batch_size, keep)
        grads = AttentionGrad.apply(*tensors, *args[9:])
        return grads, (0,) * len(grads)


def _present(grads: Inputs, sinks: bool, slopes: bool) -> tuple[Any, ...]:
    """The gradients that there are, since a Function returns tensors only."""
    return (*grads[:3], *[grads.sinks] * sinks, *[grads.slopes] * slopes)


def _spread(grads, sinks: bool, slopes: bool) -> tuple[Tensor | None, ...]:
    """The inverse of `_present`, with None for those that there are not."""
    return (*grads[:3], grads[3] if sinks else None, grads[-1] if slopes else None)


# `apply` asks for the signature of forward at every call, a quarter of the time of a small one.
for _function in (Attention, AttentionGrad):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined]

# torch.compile records each call whole, and AOTAutograd follows the rules above. Tracing into the
# class instead would refuse its jvp, and inlining its forward would lose the gradient of sinks.
torch.compiler.allow_in_graph(Attention)
torch.compiler.allow_in_graph(AttentionGrad)
