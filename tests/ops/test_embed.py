"""Embedding and unembedding."""

import pytest
import torch

from funcmodels import ops
from funcmodels.errors import ShapeError

TABLE = torch.arange(12.0).reshape(4, 3)


def test_embed_takes_rows():
    for tokens in (torch.tensor([3, 0]), torch.tensor([[[1]], [[2]]], dtype=torch.int32)):
        torch.testing.assert_close(ops.embed(tokens, TABLE), TABLE[tokens.long()])


def test_unembed_is_the_product_with_the_transpose():
    x = torch.eye(3)[[2, 0]]
    torch.testing.assert_close(ops.unembed(x, TABLE), TABLE.T[[2, 0]])
    torch.testing.assert_close(ops.unembed(x[0], TABLE), TABLE.T[2])
    assert ops.unembed(x.bfloat16(), TABLE).dtype == torch.bfloat16


def test_gradient_counts_tokens():
    tokens = torch.tensor([1, 1, 3])
    got = torch.func.grad(lambda t: ops.embed(tokens, t).sum())(TABLE)
    torch.testing.assert_close(got[:, 0], torch.tensor([0.0, 2.0, 0.0, 1.0]))


def test_per_sample_gradients():
    tokens = torch.tensor([[1, 1, 3], [0, 2, 2]])

    def loss(t, tok):
        return ops.unembed(ops.embed(tok, t), t).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(TABLE, tokens)
    want = torch.stack([torch.func.grad(loss)(TABLE, tok) for tok in tokens])
    torch.testing.assert_close(got, want)


def test_errors_name_the_fix():
    with pytest.raises(ShapeError, match=r"embed\(tokens, table\)"):
        ops.embed(TABLE, torch.tensor([[0]]))
    with pytest.raises(ShapeError, match="must be a matrix"):
        ops.embed(torch.tensor([0]), TABLE[0])
    with pytest.raises(ShapeError, match=r"fix: +table.T"):
        ops.unembed(torch.ones(4), TABLE)
