"""What a step of AdamW and a gradient allocate, in bytes, against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import funcmodels as fm
from benchmarks.allocated import peak_of
from tests.test_loss import batch_of
from tests.tiny_llama import tiny, weights_of

SMALL = 4096  # bytes: the step's number, a table of 4 rows; no parameter of these is as small
SHAPES = {"w": (300, 200), "layers": [{"up": (200, 100)}, {"up": (200, 100)}], "norm": (2000,)}


def random(dtype: torch.dtype) -> Any:
    def make(shapes: Any) -> Any:
        if isinstance(shapes, tuple):
            return torch.randn(shapes).to(dtype)
        if isinstance(shapes, list):
            return [make(each) for each in shapes]
        return {name: make(each) for name, each in shapes.items()}

    return make(SHAPES)


def nbytes(values: Any) -> int:
    return sum(leaf.nbytes for leaf in fm.tree.leaves(values))


def of_torch(weights: Any, grads: Any, **settings: Any) -> tuple[int, int]:
    """The peaks of the first step of torch.optim.AdamW, which makes its state, and of the next."""
    leaves: list[Tensor] = [w.clone().requires_grad_() for w in fm.tree.leaves(weights)]
    for leaf, grad in zip(leaves, fm.tree.leaves(grads), strict=True):
        leaf.grad = grad
    optimizer = torch.optim.AdamW(leaves, lr=0.1, **settings)
    return peak_of(optimizer.step), peak_of(optimizer.step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_donated_adamw_allocates_what_torchs_fused_one_does(dtype: torch.dtype):
    weights, grads = random(dtype), random(dtype)
    optimizer = fm.optim.adamw(0.1)
    state = optimizer.init(weights)
    held = 2 * nbytes(weights)
    first, later = of_torch(weights, grads, fused=True)
    assert abs(peak_of(lambda: optimizer.init(weights)) - first) < SMALL
    assert held <= first < held + SMALL

    def step(donate: bool) -> int:
        return peak_of(lambda: optimizer.update(grads, state, weights, donate=donate))

    assert later < SMALL
    assert step(donate=True) < SMALL
    # What shows that the measure sees a copy: the pure step, and torch's other kernel.
    assert step(donate=False) >= nbytes(weights) + held
    assert of_torch(weights, grads, foreach=True)[1] >= nbytes(weights)


def test_clipping_and_adamw_donated_allocate_nothing_of_a_parameters_size():
    weights, grads = random(torch.float32), random(torch.float32)
    optimizer = fm.optim.chain(fm.optim.clip_by_global_norm(0.1), fm.optim.adamw(0.1))
    state = optimizer.init(weights)
    assert peak_of(lambda: optimizer.update(grads, state, weights, donate=True)) < SMALL


def test_a_gradient_takes_no_more_than_autograds_and_less_than_torch_funcs():
    model = tiny(num_hidden_layers=4, hidden_size=64, intermediate_size=128)
    weights, batch = weights_of(model), batch_of(97, rows=8)

    def loss(weights: Any) -> Tensor:
        return fm.loss(model, weights, batch)

    leaves = fm.tree.map(lambda w: w.clone().requires_grad_(), weights)
    fm.grad_and_value(loss)(weights)  # tables that are made once
    ours = peak_of(lambda: fm.grad_and_value(loss)(weights))
    autograd = peak_of(lambda: torch.autograd.grad(loss(leaves), fm.tree.leaves(leaves)))
    by_func = peak_of(lambda: torch.func.grad_and_value(loss)(weights))
    assert ours <= autograd + SMALL
    assert ours < 0.8 * by_func
    print(f"{ours}, {autograd} and {by_func} bytes")
