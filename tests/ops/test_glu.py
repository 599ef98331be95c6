"""Gated activations, against their formulas and transformers' names."""

import math

import pytest
import torch
from transformers.activations import ACT2FN

from funcmodels import ops
from funcmodels.errors import ShapeError

X, UP = torch.linspace(-3, 3, 12).reshape(2, 6), torch.linspace(1, 2, 12).reshape(2, 6)


def test_swiglu():
    torch.testing.assert_close(ops.swiglu(X, UP), X / (1 + torch.exp(-X)) * UP)
    assert torch.equal(ops.swiglu(X, UP), ACT2FN["silu"](X) * UP)


def test_geglu():
    exact = X * 0.5 * (1 + torch.erf(X / math.sqrt(2))) * UP
    torch.testing.assert_close(ops.geglu(X, UP, approximate="none"), exact)
    want = ACT2FN["gelu_pytorch_tanh"](X) * UP
    got = ops.geglu(X, UP, approximate="tanh")
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", [ops.swiglu, lambda a, b: ops.geglu(a, b, approximate="none")])
def test_shapes_must_agree(op):
    with pytest.raises(ShapeError, match=r"got: +gate \(2, 6\), up \(2, 5\)"):
        op(X, UP[:, :5])
