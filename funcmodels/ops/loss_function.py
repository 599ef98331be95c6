"""The rules of differentiation and vectorisation of cross-entropy, as `torch.autograd.Function`s.

`TokenStats` gives what is needed of each token's logits, and computes them again in its backward.
`WeightedLoss` gives a sum over tokens; a sum's gradient is known up to a factor, so that it is
computed beside the loss, and no logits twice.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from funcmodels.ops import loss_logits as plain
from funcmodels.ops.forward_mode import outer_tangents, values
from funcmodels.ops.function_rules import batched, is_last_derivative
from funcmodels.ops.loss_logits import Gradient, Logits, Stats


class TokenStats(torch.autograd.Function):
    """lse, target, mean (*b, n) of (hidden, table, targets, *Logits)."""

    @staticmethod
    def forward(hidden, table, targets, *o):
        return tuple(plain.stats(hidden, table, targets, Logits(*o)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.o = Logits(*inputs[3:])

    @staticmethod
    def backward(ctx, *grads):
        hidden, table, targets = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:2])
        if not is_last_derivative():
            found = TokenStatsGrad.apply(*grads, hidden, table, targets, *ctx.o)
        else:
            by = Stats(*grads)
            found = plain.first(hidden, table, targets, by, ctx.o, needs=needs, in_place=True)
        return (*found, *[None] * (1 + len(ctx.o)))

    @staticmethod
    def jvp(ctx, *tangents):
        with outer_tangents():
            hidden, table, targets = values(ctx.saved_tensors)
            hidden_t, table_t = values(tangents[:2])
            return tuple(plain.stats_jvp(hidden, table, targets, hidden_t, table_t, ctx.o))

    @staticmethod
    def vmap(info, in_dims, *args):
        tensors = batched(args[:3], in_dims, info.batch_size, (True, False, False))
        return TokenStats.apply(*tensors, *args[3:]), (0, 0, 0)


class TokenStatsGrad(torch.autograd.Function):
    """The gradients of Σ by · stats by hidden and table, of (*by, hidden, table, targets, ..)."""

    @staticmethod
    def forward(lse, target, mean, hidden, table, targets, *o):
        by = Stats(lse, target, mean)
        return plain.first(hidden, table, targets, by, Logits(*o), in_place=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.save_for_forward(*inputs[:6])
        ctx.o = Logits(*inputs[6:])

    @staticmethod
    def backward(ctx, *tangents):
        hidden_t, table_t = tangents
        *by, hidden, table, targets = ctx.saved_tensors
        by_by = plain.stats_jvp(hidden, table, targets, hidden_t, table_t, ctx.o)
        found = plain.second(hidden, table, targets, hidden_t, table_t, Stats(*by), ctx.o)
        return (*by_by, *found, *[None] * (1 + len(ctx.o)))

    @staticmethod
    def jvp(ctx, *tangents):
        with outer_tangents():
            *by, hidden, table, targets = values(ctx.saved_tensors)
            *by_t, hidden_t, table_t = values(tangents[:5])
            curved = plain.second(hidden, table, targets, hidden_t, table_t, Stats(*by), ctx.o)
            by_t = Stats(*(_or_zeros(t, x) for t, x in zip(by_t, by, strict=True)))
            return _plus(curved, plain.first(hidden, table, targets, by_t, ctx.o))

    @staticmethod
    def vmap(info, in_dims, *args):  # a gradient per sample needs the argument per sample
        tensors = batched(args[:6], in_dims, info.batch_size, (True,) * 5 + (False,))
        return TokenStatsGrad.apply(*tensors, *args[6:]), (0, 0)


class WeightedLoss(torch.autograd.Function):
    """Σ_n weight · loss (*b,), of (hidden, table, targets, weight, needs, Weights, *Logits).

    Its further results are the gradients of the sum by hidden and table, of no dims where `needs`
    says that one is not wanted. They have no derivatives, and neither has it by weight.
    """

    @staticmethod
    def forward(hidden, table, targets, weight, needs, weights, *o):
        o = Logits(*o)
        gradient, found = Gradient(hidden, table, needs), []
        for part in plain.parts(hidden, table, o):
            z = plain.product(hidden[..., part, :], table)
            grads = []
            for block in plain.blocks(z):
                t, w = targets[..., part][..., block], weight[..., part][..., block]
                x, cap = plain.capped(z[..., block, :], o)
                target, mean = plain.picked(x, t), plain.mean_of(x, o.means)  # x is overwritten
                exps, sums, lse = plain.exponentials(x, in_place=True)
                found.append((plain.losses(Stats(lse, target, mean), weights) * w).sum(-1))
                by = plain.by_stats(w, lse, weights)
                grad = plain.by_logits(exps, sums, t, by, o, in_place=True)
                grads.append(grad if cap is None else grad.mul_(cap[0]))
                if grad.shape != z.shape:  # the product has been read
                    grads[-1] = z[..., block, :].copy_(grads[-1])
            gradient.add(part, z if len(grads) > 1 else grads[0], o)
        total = torch.stack(found).sum(0)
        none = total.new_zeros(total.shape)
        return total, *(none.clone() if g is None else g for g in gradient.result())

    @staticmethod
    def setup_context(ctx, inputs, output):
        _total, *gradients = output
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)  # of the gradients there are none: no zeros of their sizes
        ctx.save_for_backward(*inputs[:4], *gradients)
        ctx.save_for_forward(*inputs[:4])
        ctx.needs, ctx.weights, ctx.o = inputs[4], inputs[5], Logits(*inputs[6:])

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        if grads[0] is None:
            return (None,) * (6 + len(ctx.o))
        if not is_last_derivative():
            found = WeightedLossGrad.apply(grads[0], *saved, ctx.weights, *ctx.o)
        elif _is_one(grads[0]):
            found = saved[-2:]  # no copy of the table's
        else:
            found = WeightedLossGrad.forward(grads[0], *saved, ctx.weights, *ctx.o)
        found = [g if need else None for g, need in zip(found, ctx.needs, strict=True)]
        return (*found, *[None] * (4 + len(ctx.o)))

    @staticmethod
    def jvp(ctx, *tangents):
        with outer_tangents():
            hidden, table, targets, weight, *_ = values(ctx.saved_tensors)
            hidden_t, table_t = values(tangents[:2])
            s = plain.stats(hidden, table, targets, ctx.o)
            s_t = plain.stats_jvp(hidden, table, targets, hidden_t, table_t, ctx.o)
            by = plain.by_stats(weight, s.lse, ctx.weights)
            return _total(by, s_t), None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        full = (True, args[4][1], False, False)  # a gradient per sample is of a table per sample
        tensors = batched(args[:4], in_dims, info.batch_size, full)
        return WeightedLoss.apply(*tensors, *args[4:]), (0, 0, 0)


class WeightedLossGrad(torch.autograd.Function):
    """`WeightedLoss`'s gradients by hidden and table, times grad (*b,).

    They are given, as a help: the derivatives below are those of functions of grad, hidden and
    table.
    """

    @staticmethod
    def forward(grad, hidden, table, targets, weight, by_hidden, by_table, *rest):
        return tuple(
            (g * grad[(..., *[None] * (g.dim() - grad.dim()))]).to(g.dtype)
            for g in (by_hidden, by_table)
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.present = tuple(g.dim() > inputs[0].dim() for g in inputs[5:7])
        ctx.weights, ctx.o = inputs[7], Logits(*inputs[8:])

    @staticmethod
    def backward(ctx, *tangents):
        grad, hidden, table, targets, weight = ctx.saved_tensors
        hidden_t, table_t = _present(tangents, ctx.present)
        along = _along(ctx, grad, hidden, table, targets, weight, hidden_t, table_t)
        by_grad, curved = along
        return (by_grad, *curved, *[None] * (5 + len(ctx.o)))

    @staticmethod
    def jvp(ctx, *tangents):
        with outer_tangents():
            grad, hidden, table, targets, weight = values(ctx.saved_tensors)
            grad_t, hidden_t, table_t = values(tangents[:3])
            _, found = _along(ctx, grad, hidden, table, targets, weight, hidden_t, table_t)
            if grad_t is not None:
                lse = plain.stats(hidden, table, targets, ctx.o).lse
                by = plain.by_stats(weight * grad_t[..., None], lse, ctx.weights)
                found = _plus(found, plain.first(hidden, table, targets, by, ctx.o))
            none = hidden.new_zeros(grad.shape)
            return tuple(f if is_ else none for f, is_ in zip(found, ctx.present, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        full = (True, True, True, False, False, True, True)
        tensors = batched(args[:7], in_dims, info.batch_size, full)
        return WeightedLossGrad.apply(*tensors, *args[7:]), (0, 0)


def _along(ctx, grad, hidden, table, targets, weight, hidden_t, table_t):
    """Of D = the derivative of Σ weight · loss along tangents: D, and the gradients of grad · D."""
    s = plain.stats(hidden, table, targets, ctx.o)
    s_t = plain.stats_jvp(hidden, table, targets, hidden_t, table_t, ctx.o)
    by = plain.by_stats(weight, s.lse, ctx.weights)
    scaled = Stats(*(b * grad[..., None] for b in by))
    found = plain.second(hidden, table, targets, hidden_t, table_t, scaled, ctx.o)
    if ctx.weights.z_loss:  # the one part of a loss that is not linear in the stats
        zeros = torch.zeros_like(s_t.lse)
        bent = 2 * ctx.weights.z_loss * grad[..., None] * weight * s_t.lse
        bent = Stats(bent, zeros, zeros)
        found = _plus(found, plain.first(hidden, table, targets, bent, ctx.o))
    return _total(by, s_t), found


def _is_one(grad: Tensor) -> bool:
    """Whether a gradient is known to be 1, without waiting for a device or a compiler."""
    is_plain = type(grad) is Tensor and grad.device.type == "cpu" and not is_fake(grad)
    return is_plain and grad.dim() == 0 and grad.item() == 1


def _plus(one: Any, other: Any) -> tuple[Tensor, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _total(by: Stats, tangents: Stats) -> Tensor:
    """Σ_n by · tangents, (*b,)."""
    return sum((b * t).sum(-1) for b, t in zip(by, tangents, strict=True))  # type: ignore[return-value]


def _present(tangents, present) -> list[Any]:
    return [t if is_ else None for t, is_ in zip(tangents, present, strict=True)]


def _or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


# As for attention: the signature of forward is asked for at every call, and torch.compile is to
# record each call whole.
for _function in (TokenStats, TokenStatsGrad, WeightedLoss, WeightedLossGrad):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined]
    torch.compiler.allow_in_graph(_function)
