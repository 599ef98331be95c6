"""Every optimiser beside torch's own, step by step: the same bits where the same kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import funcmodels as fm

STEPS = 7


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Weights, or gradients, of a few shapes; the sizes of gradients differ by orders.

    A weight and its gradient lie in memory in different ways, and one weight is part of another
    tensor.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        scale = 10 ** (2 * torch.rand((), generator=generator) - 1)
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    a, b, c = draw(33, 17), [draw(5), draw(8, 16)], draw(24, 9)[:, :8]
    return {"a": a.T.contiguous().T if seed % 2 else a, "b": b, "c": c if seed == 0 else c.clone()}


def ours(optimizer: fm.optim.Optimizer, dtype: torch.dtype, donate: bool) -> Any:
    weights = tensors(0, dtype)
    state = optimizer.init(weights)
    for step in range(STEPS):
        weights, state = optimizer.update(tensors(step + 1, dtype), state, weights, donate=donate)
    return weights


def theirs(make: Callable[[list[Tensor]], torch.optim.Optimizer], dtype: torch.dtype) -> Any:
    """torch's fused kernels do not look at strides: autograd lays out `grad` as its parameter."""
    weights = fm.tree.map(lambda w: w.contiguous().requires_grad_(), tensors(0, dtype))
    peer = make(fm.tree.leaves(weights))
    for step in range(STEPS):
        for w, g in zip(
            fm.tree.leaves(weights), fm.tree.leaves(tensors(step + 1, dtype)), strict=True
        ):
            w.grad = g.contiguous()
        peer.step()
    return fm.tree.map(Tensor.detach, weights)


def assert_same(a: Any, b: Any) -> None:
    for (path, x), y in zip(fm.tree.items(a), fm.tree.leaves(b), strict=True):
        assert torch.equal(x, y), f"{path}: {(x - y).abs().max():.2e}"


ADAMW = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adamw(dtype, donate):
    peer = theirs(lambda ws: torch.optim.AdamW(ws, fused=True, **ADAMW), dtype)
    assert_same(ours(fm.optim.adamw(**ADAMW), dtype, donate), peer)


def test_adamw_near_the_unfused_one():
    """torch's default on the CPU rounds in another order."""
    peer = theirs(lambda ws: torch.optim.AdamW(ws, **ADAMW), torch.float32)
    fm.tree.map(
        torch.testing.assert_close, ours(fm.optim.adamw(**ADAMW), torch.float32, True), peer
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ],
)
def test_sgd(settings, dtype):
    peer = theirs(lambda ws: torch.optim.SGD(ws, fused=True, **settings), dtype)
    assert_same(ours(fm.optim.sgd(**settings), dtype, False), peer)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon(nesterov, adjust):
    """The matrices by Muon, and the vector by AdamW."""
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov}
    matrices = dict.fromkeys(("a", "b.1", "c"), "rows columns -> rows columns")
    optimizer = fm.optim.muon(
        **settings, matrices=matrices, rest=fm.optim.adamw(**ADAMW), adjust=adjust
    )

    def make(ws: list[Tensor]) -> Any:
        by_muon = torch.optim.Muon([w for w in ws if w.ndim == 2], adjust_lr_fn=adjust, **settings)
        by_adamw = torch.optim.AdamW([w for w in ws if w.ndim == 1], fused=True, **ADAMW)

        class Both:
            def step(self) -> None:
                by_muon.step()
                by_adamw.step()

        return Both()

    assert_same(ours(optimizer, torch.float32, True), theirs(make, torch.float32))


def test_clipping():
    grads = fm.tree.map(lambda g: g.requires_grad_(), tensors(1))
    for leaf in fm.tree.leaves(grads):
        leaf.grad = leaf.detach().clone()
    expected = torch.nn.utils.clip_grad_norm_(fm.tree.leaves(grads), 0.5)
    clipped = fm.optim.clip_by_global_norm(0.5)(tensors(1))
    assert torch.equal(fm.optim.global_norm(tensors(1)), expected)
    assert_same(clipped, fm.tree.map(lambda g: g.grad, grads))
    assert fm.optim.global_norm(clipped) == pytest.approx(0.5, rel=1e-5)
    assert_same(fm.optim.clip_by_global_norm(1e9)(tensors(1)), tensors(1))
