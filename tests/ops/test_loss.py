"""`ops.cross_entropy` against torch's cross-entropy of all logits, in float64, to any order."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from funcmodels import ops
from funcmodels.errors import ShapeError
from funcmodels.ops import loss_logits

N, HIDDEN, VOCAB = 7, 4, 11
CASES = {
    "plain": {},
    "all tokens": {"mask": None},
    "smooth": {"label_smoothing": 0.1, "z_loss": 0.01, "scale": 0.7},
    "softcap": {"label_smoothing": 0.1, "z_loss": 0.02, "scale": 0.7, "softcap": 2.0},
}
TARGETS = torch.arange(N) * 3 % VOCAB
MASK = torch.tensor([True, True, False, True, True, False, True])


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Two tokens' logits at a time, of a chunk of three; `tests/test_loss.py` has all at once."""
    monkeypatch.setattr(loss_logits, "BLOCK", 2 * VOCAB)


def case(name, reduction):
    """The op and the closed form as functions of hidden and table, and their arguments."""
    kwargs = {"mask": MASK, **CASES[name]}
    mask = torch.ones(N) if kwargs["mask"] is None else kwargs["mask"]
    cap, z_loss = kwargs.get("softcap"), kwargs.get("z_loss", 0.0)

    def want(hidden, table):
        x = kwargs.get("scale", 1.0) * hidden @ table.T
        x = x if cap is None else cap * torch.tanh(x / cap)
        smoothing = kwargs.get("label_smoothing", 0.0)
        each = F.cross_entropy(x, TARGETS, reduction="none", label_smoothing=smoothing)
        each = (each + z_loss * x.logsumexp(-1) ** 2) * mask
        return {"none": each, "sum": each.sum(), "mean": each.sum() / mask.sum()}[reduction]

    def got(hidden, table):
        return ops.cross_entropy(hidden, table, TARGETS, chunk=3, reduction=reduction, **kwargs)

    return got, want, [torch.randn(N, HIDDEN).double(), torch.randn(VOCAB, HIDDEN).double()]


cases = pytest.mark.parametrize("name", CASES)
reductions = pytest.mark.parametrize("reduction", ["mean", "none"])


def total(fn):
    return lambda *xs: (fn(*xs) * torch.arange(1.0, 1 + fn(*xs).numel()).double()).sum()


@cases
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_and_gradients_equal_the_closed_form(name, reduction):
    got, want, xs = case(name, reduction)
    torch.testing.assert_close(got(*xs), want(*xs))
    leaves = [x.requires_grad_() for x in xs]
    wanted = torch.autograd.grad(total(want)(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(total(got)(*leaves), leaves), wanted)
    torch.testing.assert_close(grad(total(got), (0, 1))(*xs), wanted)
    for i in (0, 1):  # by one alone: of the other, nothing is computed
        only = [x.detach().requires_grad_(i == j) for j, x in enumerate(xs)]
        torch.testing.assert_close(torch.autograd.grad(total(got)(*only), only[i])[0], wanted[i])


@cases
@reductions
def test_derivatives_equal_finite_differences(name, reduction):
    got, _, xs = case(name, reduction)
    xs = [x.requires_grad_() for x in xs]
    assert gradcheck(got, xs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(got, xs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "softcap"])
@reductions
def test_hessians_of_every_mode_equal_the_closed_form(name, reduction):
    got, want, xs = case(name, reduction)
    wanted = hessian(total(want), (0, 1))(*xs)
    for forward, backward in ((jacfwd, jacrev), (jacrev, jacrev), (jacfwd, jacfwd)):
        found = forward(backward(total(got), (0, 1)), (0, 1))(*xs)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["plain", "softcap"])
@reductions
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)])
def test_vmap_inside_and_outside_of_grad(name, reduction, in_dims):
    got, want, xs = case(name, reduction)
    xs = [
        x if d is None else torch.randn(3, *x.shape).double()
        for x, d in zip(xs, in_dims, strict=True)
    ]

    def per_sample(fn):
        return vmap(grad(total(fn), (0, 1)), in_dims)(*xs)

    def of_all(fn):
        return grad(lambda *xs: vmap(total(fn), in_dims)(*xs).sum(), (0, 1))(*xs)

    torch.testing.assert_close(per_sample(got), per_sample(want))
    torch.testing.assert_close(of_all(got), of_all(want))


def test_a_mask_of_weights_has_a_gradient():
    hidden, table = torch.randn(N, HIDDEN).double(), torch.randn(VOCAB, HIDDEN).double()

    def want(weight):
        each = F.cross_entropy(hidden @ table.T, TARGETS, reduction="none")
        return (each * weight).sum() / weight.sum()

    def got(weight):
        return ops.cross_entropy(hidden, table, TARGETS, mask=weight)

    weight = torch.rand(N).double()
    torch.testing.assert_close(got(weight), want(weight))
    torch.testing.assert_close(grad(got)(weight), grad(want)(weight))


def test_masked_targets_may_be_anything_and_no_token_has_no_loss():
    hidden, table = torch.randn(N, HIDDEN), torch.randn(VOCAB, HIDDEN)
    ignored = torch.where(MASK, TARGETS, -100)
    got = ops.cross_entropy(hidden, table, ignored, mask=MASK)
    want = F.cross_entropy(hidden @ table.T, ignored)
    torch.testing.assert_close(got, want)
    hidden.requires_grad_()
    none = ops.cross_entropy(hidden, table, ignored, mask=torch.zeros(N, dtype=torch.bool))
    assert none == 0
    assert torch.autograd.grad(none, hidden)[0].count_nonzero() == 0
    assert ops.cross_entropy(hidden[:0], table, TARGETS[:0]) == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bfloat16_is_a_product_in_bfloat16_and_the_rest_in_float32(reduction):
    hidden, table = torch.randn(64, 32).bfloat16(), torch.randn(512, 32).bfloat16()
    targets = torch.randint(0, 512, (64,))
    hidden, table = hidden.requires_grad_(), table.requires_grad_()
    got = ops.cross_entropy(hidden, table, targets, chunk=16, reduction=reduction)
    want = F.cross_entropy((hidden @ table.T).float(), targets, reduction=reduction)
    torch.testing.assert_close(got, want)
    found = torch.autograd.grad(got.sum(), (hidden, table))
    wanted = torch.autograd.grad(want.sum(), (hidden, table))
    exact = hidden.detach().double().requires_grad_(), table.detach().double().requires_grad_()
    true = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction=reduction).sum()
    for ours, torchs, best in zip(found, wanted, torch.autograd.grad(true, exact), strict=True):
        assert (ours - best).norm() <= 1.05 * (torchs - best).norm()


class Largest(TorchDispatchMode):
    """The largest number of elements of any result."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("how", ["autograd", "func"])
def test_the_logits_of_all_tokens_never_exist(reduction, how):
    hidden, table = torch.randn(64, 8), torch.randn(100, 8)
    targets = torch.randint(0, 100, (64,))

    def loss(hidden, table, chunk=8):
        each = ops.cross_entropy(hidden, table, targets, chunk=chunk, reduction=reduction)
        return each.sum()

    def largest(chunk):
        with Largest() as mode:
            if how == "func":
                grad(loss, (0, 1))(hidden, table, chunk)
            else:
                leaves = [x.clone().requires_grad_() for x in (hidden, table)]
                torch.autograd.grad(loss(*leaves, chunk), leaves)
        return mode.numel

    assert largest(8) == 8 * 100  # a chunk, and the table
    assert largest(64) == 64 * 100


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole(reduction):
    got, _, xs = case("softcap", reduction)
    fn = torch.compile(grad(total(got), (0, 1)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fn(*xs), grad(total(got), (0, 1))(*xs))


def test_what_does_not_fit_is_refused():
    hidden, table = torch.randn(N, HIDDEN), torch.randn(VOCAB, HIDDEN)
    with pytest.raises(ShapeError, match="table must be a matrix"):
        ops.cross_entropy(hidden, table.T, TARGETS)
    with pytest.raises(ShapeError, match="targets must hold"):
        ops.cross_entropy(hidden, table, TARGETS[1:])
    with pytest.raises(ShapeError, match="mask needs one value"):
        ops.cross_entropy(hidden, table, TARGETS, mask=MASK[1:])
    for wrong in ({"reduction": "all"}, {"chunk": 0}, {"label_smoothing": 2.0}, {"softcap": 0.0}):
        with pytest.raises(ShapeError, match="is out of range"):
            ops.cross_entropy(hidden, table, TARGETS, **wrong)
