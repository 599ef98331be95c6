"""Gradients of tables by their rows: autograd's to the last bit, without tables of zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import funcmodels as fm
from funcmodels import ops
from tests.ops.test_loss import Largest

VOCAB, HIDDEN = 50, 8
TOKENS = torch.tensor([[1, 3, 3, 0, 3], [3, 49, 1, 1, 3]])


def weights(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
        for name in ("embed", "other", "unused")
    }


LOSSES = {
    "tied": lambda w: ops.unembed(ops.embed(TOKENS, w["embed"]).tanh(), w["embed"]).square().mean(),
    "not tied": lambda w: ops.unembed(ops.embed(TOKENS, w["embed"]), w["other"]).square().mean(),
    "twice": lambda w: (ops.embed(TOKENS, w["embed"]) * ops.embed(TOKENS + 0, w["other"])).sum(),
    # One gradient for two leaves, and one that is no memory of its own.
    "shared": lambda w: (
        (w["embed"] + w["other"] + ops.embed(TOKENS, w["embed"]).sum()).tanh().sum()
    ),
    "expanded": lambda w: w["embed"].sum() + ops.embed(TOKENS, w["embed"]).square().sum(),
    "in place": lambda w: ops.embed(TOKENS, w["embed"]).mul_(3.0).square().sum(),
    "in a transform": lambda w: torch.vmap(lambda t: ops.embed(t, w["embed"]))(TOKENS).exp().sum(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_gradients_of_autograd(loss, dtype):
    given = weights(dtype)
    leaves = {name: w.clone().requires_grad_() for name, w in given.items()}
    want = torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True)
    found, _ = fm.grad_and_value(loss)(given)
    for got, expected in zip(found.values(), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    again, _ = fm.grad_and_value(loss)(given)
    torch.testing.assert_close(again, found, rtol=0, atol=0)


class Held(torch.autograd.Function):
    """Σ w · held, whose backward hands out the memory that it holds."""

    @staticmethod
    def forward(ctx, w, held):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.held = held
        return (w * held).sum()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.held, None


def test_memory_of_others_is_not_added_to():
    held = torch.ones(VOCAB, HIDDEN)
    grads, _ = fm.grad_and_value(
        lambda w: Held.apply(w["embed"], held) + ops.embed(TOKENS, w["embed"]).sum()
    )(weights())
    assert held.eq(1).all()
    assert grads["embed"][3].eq(6).all()  # five times the row, and once all


def test_no_table_beside_the_gradient():
    given = {"embed": weights()["embed"]}

    def loss(w, embed):
        hidden = embed(TOKENS, w["embed"])
        return ops.cross_entropy(hidden, w["embed"], TOKENS)

    class Tables(Largest):
        """Counts what is made of the table's size."""

        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            name = func.__name__
            new = any(part in name for part in ("mm", "zeros", "embedding_dense", "clone", "add."))
            self.made += isinstance(out, torch.Tensor) and out.shape == (VOCAB, HIDDEN) and new
            return out

    with Tables() as ours:
        fm.grad_and_value(lambda w: loss(w, ops.embed))(given)
    with Tables() as autograd:
        fm.grad_and_value(lambda w: loss(w, F.embedding))(given)
    assert (ours.made, autograd.made) == (1, 3)  # the head's; and zeros with rows, and the sum


def test_a_compiled_loss_is_one_graph_for_all_steps():
    """New weights in each step, as an optimiser gives: each table was a graph of its own."""
    compiled = torch.compile(LOSSES["tied"], backend="aot_eager", fullgraph=True)
    for step in range(3):
        given = fm.tree.map(lambda w, step=step: w + step, weights())
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            grads, loss = fm.grad_and_value(compiled)(given)
        want, value = fm.grad_and_value(LOSSES["tied"])(given)
        torch.testing.assert_close((grads, loss), (want, value))
