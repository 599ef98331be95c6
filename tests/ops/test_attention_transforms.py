"""`ops.attention` under torch.func, against finite differences and loops."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from funcmodels import ops

SEQ, HEADS, KV_HEADS, DIM = 4, 4, 2, 3
CASES = {
    "plain": {},
    "everything": {"window": 2, "segment_ids": torch.tensor([0, 0, 0, 1]), "extra": True},
    "softcap": {"softcap": 1.5, "causal": False, "extra": True},
    "wide values": {"dv": 5},
}


def case(name):
    """A function of q, k, v and perhaps sinks and slopes, and its float64 arguments."""
    kwargs = dict(CASES[name])
    dv, extra = kwargs.pop("dv", DIM), kwargs.pop("extra", False)
    shapes = [(SEQ, HEADS, DIM), (SEQ, KV_HEADS, DIM), (SEQ, KV_HEADS, dv)]
    shapes += [(HEADS,), (HEADS,)] * extra

    def fn(q, k, v, sinks=None, alibi_slopes=None):
        return ops.attention(q, k, v, sinks=sinks, alibi_slopes=alibi_slopes, **kwargs)

    return fn, [torch.randn(*s, dtype=torch.float64) for s in shapes]


def loss_of(fn, width):
    weight = torch.randn(SEQ, HEADS, width, dtype=torch.float64)
    return lambda *xs: (fn(*xs) * weight).square().sum()


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivatives_equal_finite_differences(name):
    fn, xs = case(name)
    xs = [x.requires_grad_() for x in xs]
    assert gradcheck(fn, xs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(fn, xs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


def test_full_jacobian_equals_finite_differences():
    fn, xs = case("everything")
    assert gradcheck(fn, [x.requires_grad_() for x in xs], check_forward_ad=True)


@pytest.mark.parametrize("name", CASES)
def test_func_grad_equals_autograd(name):
    fn, xs = case(name)
    loss = loss_of(fn, fn(*xs).shape[-1])
    got = grad(loss, argnums=tuple(range(len(xs))))(*xs)
    leaves = [x.clone().requires_grad_() for x in xs]
    torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves), leaves))


@pytest.mark.parametrize("name", ["everything", "softcap"])
@pytest.mark.parametrize("shared", ["none", "sinks and slopes", "q", "all but slopes"])
def test_per_sample_gradients_equal_a_loop(name, shared):
    fn, xs = case(name)
    loss = loss_of(fn, DIM)
    size = 3
    in_dims = {
        "none": (0, 0, 1, 0, 0),
        "sinks and slopes": (0, 0, 0, None, None),
        "q": (None, 0, 0, 0, None),
        "all but slopes": (None, None, None, None, 0),
    }[shared]
    many = [
        x if d is None else torch.randn(*x.shape[:d], size, *x.shape[d:], dtype=x.dtype)
        for x, d in zip(xs, in_dims, strict=True)
    ]
    by = tuple(range(5))
    got = vmap(grad(loss, argnums=by), in_dims=in_dims)(*many)
    for i in range(size):
        one = [x if d is None else x.select(d, i) for x, d in zip(many, in_dims, strict=True)]
        torch.testing.assert_close([g[i] for g in got], list(grad(loss, argnums=by)(*one)))


def test_vmap_over_segment_ids():
    _, (q, k, v) = case("plain")
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    got = vmap(lambda s: ops.attention(q, k, v, segment_ids=s))(ids)
    want = torch.stack([ops.attention(q, k, v, segment_ids=s) for s in ids])
    torch.testing.assert_close(got, want)


def test_nested_vmap():
    fn, (q, k, v, sinks, slopes) = case("everything")
    g = grad(lambda q, s: loss(q, k, v, s, slopes))
    loss = loss_of(fn, DIM)
    got = vmap(vmap(g, in_dims=(0, None)), in_dims=(None, 0))(
        torch.stack([q, 2 * q]), torch.stack([sinks, sinks + 1, sinks - 1])
    )
    torch.testing.assert_close(got[2, 1], g(2 * q, sinks - 1))


@pytest.mark.parametrize("name", CASES)
def test_jvp_is_the_transpose_of_vjp(name):
    fn, xs = case(name)
    tangents = tuple(torch.randn_like(x) for x in xs)
    out, pull = vjp(fn, *xs)
    cotangent = torch.randn_like(out)
    _, pushed = jvp(fn, tuple(xs), tangents)
    left = (pushed * cotangent).sum()
    right = sum((a * b).sum() for a, b in zip(pull(cotangent), tangents, strict=True))
    torch.testing.assert_close(left, right)
    _, double_back = torch.autograd.functional.jvp(fn, tuple(xs), tangents)
    torch.testing.assert_close(pushed, double_back)


@pytest.mark.parametrize("name", ["everything", "softcap"])
def test_hessian_vector_products_agree_with_differences_of_gradients(name):
    fn, (q, k, v, *rest) = case(name)
    loss = loss_of(fn, DIM)
    by = (0, 1, 2)

    def gradient(*x):
        return grad(loss, argnums=by)(*x, *rest)

    x, t = (q, k, v), tuple(torch.randn_like(x) for x in (q, k, v))
    forward_over_reverse = jvp(gradient, x, t)[1]

    def inner(*x):
        return sum((g * u).sum() for g, u in zip(gradient(*x), t, strict=True))

    reverse_over_reverse = grad(inner, argnums=by)(*x)
    reverse_over_forward = grad(
        lambda *x: jvp(lambda *y: loss(*y, *rest), x, t)[1], argnums=by
    )(*x)  # fmt: skip
    step = 1e-5
    ahead = gradient(*(a + step * b for a, b in zip(x, t, strict=True)))
    behind = gradient(*(a - step * b for a, b in zip(x, t, strict=True)))
    differences = tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))
    torch.testing.assert_close(forward_over_reverse, differences, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reverse_over_reverse, forward_over_reverse)
    torch.testing.assert_close(reverse_over_forward, forward_over_reverse)


def test_jacobians_and_hessians_agree():
    fn, (q, k, v, sinks, slopes) = case("everything")

    def f(s, a):
        return fn(q, k, v, s, a)

    torch.testing.assert_close(jacrev(f, (0, 1))(sinks, slopes), jacfwd(f, (0, 1))(sinks, slopes))
    loss = loss_of(fn, DIM)

    def g(s, a):
        return loss(q, k, v, s, a)

    torch.testing.assert_close(
        hessian(g, (0, 1))(sinks, slopes),
        jacrev(jacrev(g, (0, 1)), (0, 1))(sinks, slopes),
    )


def test_third_derivative():
    fn, (q, k, v) = case("plain")
    loss = loss_of(fn, DIM)
    t = torch.randn_like(q)

    def along(f):
        return lambda q: jvp(f, (q,), (t,))[1]

    third = along(along(along(lambda q: loss(q, k, v))))(q)
    second = along(along(lambda q: loss(q, k, v)))
    step = 1e-4
    torch.testing.assert_close(
        third, (second(q + step * t) - second(q - step * t)) / (2 * step), rtol=1e-5, atol=1e-6
    )
    reverse = grad(lambda q: (grad(lambda q: (grad(loss)(q, k, v) * t).sum())(q) * t).sum())(q)
    torch.testing.assert_close((reverse * t).sum(), third)


def test_slopes_given_as_floats_are_constants():
    _fn, (q, k, v) = case("plain")
    slopes = (0.5, 0.25, 0.125, 0.0625)

    def f(q, a):
        return ops.attention(q, k, v, alibi_slopes=a).square().sum()

    want = grad(f)(q, torch.tensor(slopes, dtype=q.dtype))
    torch.testing.assert_close(grad(f)(q, slopes), want)


def test_nested_forward_mode_over_reverse():
    # PyTorch alone would give zeros here, without an error.
    fn, (q, k, v) = case("softcap")[0], case("softcap")[1][:3]
    loss = loss_of(fn, DIM)
    t = torch.randn_like(q)

    def along(f):
        return lambda q: jvp(f, (q,), (t,))[1]

    def gradient(q):
        return grad(loss)(q, k, v)

    step = 1e-4
    first = along(gradient)
    differences = (first(q + step * t) - first(q - step * t)) / (2 * step)
    torch.testing.assert_close(along(first)(q), differences, rtol=1e-5, atol=1e-6)


def test_mixed_second_derivative_by_slopes():
    # The inner gradient does not ask for that of slopes, and the outer one does.
    fn, (q, k, v, sinks, slopes) = case("everything")
    loss = loss_of(fn, DIM)
    t = torch.randn_like(q)

    def by_q(slopes):
        return (grad(loss)(q, k, v, sinks, slopes) * t).sum()

    def by_slopes(q):
        return grad(loss, argnums=4)(q, k, v, sinks, slopes)

    torch.testing.assert_close(grad(by_q)(slopes), jvp(by_slopes, (q,), (t,))[1])


class Calls(TorchDispatchMode):
    """Counts torch's operations whose name says attention."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.__name__:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_per_sample_gradients_are_two_calls_of_a_kernel():
    """One forward and one backward for all samples, not for each of them."""
    q, k, v = (torch.randn(8, 1, 32, heads, 16) for heads in (4, 2, 2))

    def loss(q, k, v):
        return ops.attention(q, k, v).square().sum()

    with Calls() as calls:
        found = vmap(grad(loss, (0, 1, 2)))(q, k, v)
    assert len(calls.names) == 2, calls.names
    assert sum("backward" in name for name in calls.names) == 1
    for i in range(8):
        want = grad(loss, (0, 1, 2))(q[i], k[i], v[i])
        torch.testing.assert_close(tuple(g[i] for g in found), want)
