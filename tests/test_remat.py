"""`@fm.block(remat=True)`: the same derivatives of every kind, from less that is kept."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import TraceError

DIM, SEQ = 8, 6


def body(p, x, ids=None, *, power=2):
    """Something of everything: attention, a norm, an argument that is no tensor, two results."""
    h = ops.rms_norm(x, p["norm"], eps=1e-5)
    heads = (h @ p["up"]).unflatten(-1, (2, -1))
    h = ops.attention(heads, heads, heads, segment_ids=ids).flatten(-2)
    return {"x": x + torch.tanh(h) ** power @ p["down"], "rest": (h.sum(), ids)}


plain, kept = fm.block(body), fm.block(remat=True)(body)


def weights(dtype=torch.float64):
    shapes = {"norm": (DIM,), "up": (DIM, 4 * DIM), "down": (4 * DIM, DIM)}
    return {name: 0.3 * torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def loss_of(block, ids=None):
    def loss(p, x):
        for power in (2, 3):
            out = block(p, x, ids, power=power)
            x = out["x"] + out["rest"][0]
        return (x * torch.arange(x.numel()).reshape(x.shape)).square().mean()

    return loss


IDS = {"one document": None, "two documents": torch.tensor([0, 0, 1, 1, 1, 1])}
ids_cases = pytest.mark.parametrize("ids", IDS.values(), ids=IDS)


@ids_cases
def test_derivatives_of_every_kind_are_the_plain_ones(ids):
    p, x = weights(), torch.randn(SEQ, DIM).double()
    a, b = loss_of(kept, ids), loss_of(plain, ids)
    tangents = fm.tree.map(torch.ones_like, p), torch.randn_like(x)

    def same(transform):
        torch.testing.assert_close(transform(a), transform(b))

    same(lambda f: f(p, x))
    same(lambda f: grad(f, (0, 1))(p, x))
    same(lambda f: jvp(f, (p, x), tangents))
    same(lambda f: jvp(grad(f), (p, x), tangents))
    same(lambda f: grad(lambda p: jvp(lambda x: f(p, x), (x,), tangents[1:])[1])(p))
    same(lambda f: grad(lambda x: sum(g.sum() for g in grad(f)(p, x).values()))(x))
    xs = torch.randn(3, SEQ, DIM).double()
    same(lambda f: vmap(grad(f), (None, 0))(p, xs))
    same(lambda f: grad(lambda p: vmap(f, (None, 0))(p, xs).sum())(p))
    same(lambda f: vmap(vmap(grad(f, 1), (None, 0)), (None, 0))(p, xs[None]))
    leaves = [t.clone().requires_grad_() for t in (*p.values(), x)]

    def of_leaves(f):
        return f(dict(zip(p, leaves[:-1], strict=True)), leaves[-1])

    same(lambda f: torch.autograd.grad(of_leaves(f), leaves))

    def twice(f):
        first = torch.autograd.grad(of_leaves(f), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    same(twice)


def test_hessians():
    p, x = weights(), torch.randn(2, DIM).double()
    a, b = (lambda x, f=f: f(p, x) for f in (loss_of(kept), loss_of(plain)))
    want = hessian(b)(x)
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacrev), (jacfwd, jacfwd)):
        torch.testing.assert_close(outer(inner(a))(x), want)


def test_compiled():
    p, x = weights(), torch.randn(SEQ, DIM).double()
    leaves = fm.tree.map(lambda t: t.clone().requires_grad_(), p)
    want = grad(loss_of(plain))(p, x)
    loss = torch.compile(loss_of(kept), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(loss(leaves, x), list(leaves.values()))
    torch.testing.assert_close(dict(zip(p, got, strict=True)), want)
    inside = torch.compile(grad(loss_of(kept)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(inside(p, x), want)


def test_only_arguments_are_kept():
    p, x = weights(), torch.randn(SEQ, DIM).double()
    leaves = fm.tree.map(lambda t: t.clone().requires_grad_(), p)
    given = {t.data_ptr() for t in (*leaves.values(), x)}

    def kept_bytes(block):
        seen = {}

        def pack(t):
            seen[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            block(leaves, x)
        return sum(size for at, size in seen.items() if at not in given)

    assert kept_bytes(kept) == 0
    assert kept_bytes(plain) > 10 * x.nbytes


def test_no_gradient_is_lost_without_an_error():
    w = torch.randn(DIM, requires_grad=True)
    with pytest.raises(TraceError, match="uses a tensor from around it"):

        @fm.block(remat=True)
        def scaled(x):
            return x * w


def test_without_gradients_and_of_arguments_returned():
    x = torch.randn(3, requires_grad=True)

    @fm.block(remat=True)
    def returned(x, y):
        return x, y * 2, torch.arange(3)

    with torch.no_grad():
        assert not returned(x, x)[1].requires_grad
    same, twice, ids = returned(x, x)
    assert not ids.requires_grad
    assert torch.autograd.grad((same + twice).sum(), x)[0].tolist() == [3.0] * 3
