"""The ready-made recurrences, against loops in float64 written from their formulas."""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import ShapeError

delta_rule, linear_attention, short_conv, ssd = (
    importlib.import_module(f"funcmodels.ops.{name}")
    for name in ("delta_rule", "linear_attention", "short_conv", "ssd")
)

SEQ, HEADS, KEY, VALUE = 150, 2, 4, 3  # longer than two chunks, and no multiple of one


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(by_key=False, seed=0):
    q, k, v = (rows(SEQ, HEADS, n, seed=seed + i) for i, n in enumerate((KEY, KEY, VALUE)))
    g = -rows(SEQ, HEADS, *([KEY] if by_key else []), seed=seed + 3).abs()
    return q, k / k.norm(dim=-1, keepdim=True), v, g


def attention_loop(q, k, v, g):
    S, out = torch.zeros(HEADS, KEY, VALUE).double(), []
    for t in range(len(q)):
        decay = g[t].exp() if g.ndim == 3 else g[t].exp()[:, None].expand(HEADS, KEY)
        S = decay[:, :, None] * S + k[t][:, :, None] * v[t][:, None, :]
        out.append((S * q[t][:, :, None]).sum(1))
    return torch.stack(out)


def delta_loop(q, k, v, g, beta):
    S, out = [torch.zeros(VALUE, KEY).double()] * HEADS, []
    eye = torch.eye(KEY).double()
    for t in range(len(q)):
        for h in range(HEADS):
            kk = torch.outer(k[t, h], k[t, h])
            kept = g[t, h].exp() * S[h] @ (eye - beta[t, h] * kk)
            new = kept + beta[t, h] * torch.outer(v[t, h], k[t, h])
            S = [*S[:h], new, *S[h + 1 :]]
        out.append(torch.einsum("hvk,hk->hv", torch.stack(S), q[t]))
    return torch.stack(out)


@pytest.mark.parametrize("by_key", [False, True])
def test_gated_linear_attention(by_key):
    args = inputs(by_key)
    y = ops.gated_linear_attention(*args)
    torch.testing.assert_close(y, attention_loop(*args), rtol=0, atol=1e-10)


@pytest.mark.parametrize("by_key", [False, True])
def test_strong_decay_does_not_overflow(by_key):
    q, k, v, g = (x.float() for x in inputs(by_key))
    y = ops.gated_linear_attention(q, k, v, 40 * g)
    want = attention_loop(*(x.double() for x in (q, k, v, 40 * g)))
    torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-5)


def test_gated_delta_rule():
    args = (*inputs(), rows(SEQ, HEADS, seed=9).sigmoid())
    y = ops.gated_delta_rule(*args)
    torch.testing.assert_close(y, delta_loop(*args), rtol=0, atol=1e-10)


def test_gated_delta_rule_of_keys_at_length_1():
    q, k, *rest = *inputs(), rows(SEQ, HEADS, seed=9).sigmoid()
    y = ops.gated_delta_rule(7 * q, 3 * k, *rest, scale=0.3, normalise=True)
    q, k = (F.normalize(x, dim=-1) for x in (q, k))
    torch.testing.assert_close(y, 0.3 * delta_loop(q, k, *rest), rtol=0, atol=1e-5)  # eps


def test_ssd():
    x, dt, A, B, C, D = ssd_inputs(SEQ)
    want = ssd_loop(x, dt, A, B, C, D)
    torch.testing.assert_close(ops.ssd(x, dt, A, B, C, D=D), want, rtol=0, atol=1e-10)
    with pytest.raises(ShapeError, match="heads cannot be grouped"):
        ops.ssd(x, dt, A, B.repeat(1, 2, 1)[:, :3], C.repeat(1, 2, 1)[:, :3])


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("seq", [1, 2, 9])
def test_short_conv(width, seq):
    x, weight, bias = rows(seq, 5), rows(5, width, seed=1), rows(5, seed=2)
    padded = torch.cat([torch.zeros(width - 1, 5).double(), x])
    want = torch.nn.functional.conv1d(padded.T[None], weight[:, None], bias, groups=5)[0].T
    torch.testing.assert_close(ops.short_conv(x, weight, bias), want, rtol=0, atol=1e-12)
    with pytest.raises(ShapeError, match="weight and x do not fit"):
        ops.short_conv(x, weight[:3])


def test_short_conv_in_bfloat16_rounds_its_sum_once():
    x, weight, bias = (t.bfloat16() for t in (rows(300, 5), rows(5, 4, seed=1), rows(5, seed=2)))
    exact = ops.short_conv(x.double(), weight.double(), bias.double())
    assert torch.equal(ops.short_conv(x, weight, bias), exact.bfloat16())


CALLS = {
    "gated_linear_attention": lambda p, ids: ops.gated_linear_attention(
        p["q"], p["k"], p["v"], p["g"], segment_ids=ids
    ),
    "by key": lambda p, ids: ops.gated_linear_attention(
        p["q"], p["k"], p["v"], p["by_key"], segment_ids=ids
    ),
    "gated_delta_rule": lambda p, ids: ops.gated_delta_rule(
        p["q"], p["k"], p["v"], p["g"], p["beta"], segment_ids=ids
    ),
    "ssd": lambda p, ids: ops.ssd(p["v"], p["beta"], p["g"][0, 0], p["k"], p["q"], segment_ids=ids),
    "short_conv": lambda p, ids: ops.short_conv(p["x"], p["k"][0, :5, 0], segment_ids=ids),
}


@pytest.mark.parametrize("name", CALLS)
def test_packed_documents_equal_separate_rows(name):
    lengths = (70, 1, 64, 15)
    q, k, v, g = (x[None] for x in inputs())
    p = {"q": q, "k": k, "v": v, "g": g, "beta": g.exp(), "by_key": g[..., None] - q.abs()}
    p["x"] = rows(1, SEQ, 5)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = CALLS[name](p, ids)
    at = 0
    for n in lengths:
        part = {key: x[:, at : at + n] for key, x in p.items()}
        if name == "ssd":
            part["g"] = p["g"]
        if name == "short_conv":
            part["k"] = p["k"]
        alone = CALLS[name](part, None)
        torch.testing.assert_close(packed[:, at : at + n], alone, rtol=0, atol=1e-11)
        at += n


def test_chunked_forms_are_their_steps():
    q, k, v, g = (x[:20] for x in inputs())
    by_key = -rows(20, HEADS, KEY).abs()
    of = {"q": q, "k": k, "v": v, "g": g, "beta": g.exp()}
    memory = linear_attention.memory(HEADS, KEY, VALUE)
    check = fm.check_recurrence
    assert check(linear_attention.step, linear_attention.chunked, memory, of) < 1e-12
    assert (
        check(linear_attention.key_step, linear_attention.key_chunked, memory, of | {"g": by_key})
        < 1e-12
    )
    assert check(delta_rule.step, delta_rule.chunked, memory, of) < 1e-12
    assert check(delta_rule.unit_step, delta_rule.unit_chunked, memory, of) < 1e-12
    window = fm.state(x="window channels", dtype=torch.float32, channels=5, window=3)
    params = {"weight": rows(5, 4), "bias": rows(5)}
    assert check(short_conv.step, short_conv.chunked, window, rows(20, 5), params=params) < 1e-12
    held = fm.state(h="heads p n", dtype=torch.float64, heads=HEADS, p=VALUE, n=KEY)
    mamba = {"x": v, "dt": g.exp(), "B": k[:, :1], "C": q[:, :1]}
    params = {"A": -rows(HEADS).exp(), "D": rows(HEADS)}
    assert check(ssd.step, ssd.chunked, held, mamba, params=params) < 1e-12


def test_more_tokens_than_a_chunk_may_hold():
    q, k, v, g = (x[:17] for x in inputs(by_key=True))
    state = linear_attention.memory(HEADS, KEY, VALUE, torch.float64)
    with pytest.raises(ShapeError, match="a chunk of too many tokens"):
        linear_attention.key_chunked(
            state.initial((), torch.device("cpu")), {"q": q, "k": k, "v": v, "g": g}
        )


@pytest.mark.parametrize("by_key", [False, True])
def test_all_is_forgotten_at_once(by_key):
    """A decay of 0, in the middle of a chunk: as a document that begins there."""
    q, k, v, g = inputs(by_key)
    g[70] = -torch.inf
    args = tuple(x.clone().requires_grad_() for x in (q, k, v, g))
    y = ops.gated_linear_attention(*args)
    alone = ops.gated_linear_attention(*(x[70:] for x in args))
    torch.testing.assert_close(y[70:], alone, rtol=0, atol=1e-12)
    for grad in torch.autograd.grad(y[70:].square().sum(), args):
        assert grad.isfinite().all()
        assert (grad[:70] == 0).all()


def ssd_loop(x, dt, A, B, C, D):
    h, out = torch.zeros(4, KEY, VALUE).double(), []
    for t in range(len(x)):
        b, c = B[t].repeat_interleave(2, 0), C[t].repeat_interleave(2, 0)
        h = (dt[t] * A).exp()[:, None, None] * h
        h = h + dt[t][:, None, None] * b[:, :, None] * x[t][:, None, :]
        out.append(torch.einsum("hk,hkv->hv", c, h) + D[:, None] * x[t])
    return torch.stack(out)


def ssd_inputs(seq):
    x, B, C = rows(seq, 4, VALUE), rows(seq, 2, KEY, seed=1), rows(seq, 2, KEY, seed=2)
    return x, rows(seq, 4, seed=3).exp(), -rows(4, seed=4).abs(), B, C, rows(4, seed=5)


def conv_loop(x, weight, bias):
    width = weight.shape[1]
    padded = torch.cat([torch.zeros(width - 1, x.shape[1]).double(), x])
    return sum(padded[i : i + len(x)] * weight[:, i] for i in range(width)) + bias


def first(count, args):
    return tuple(x[:count] for x in args)


LOOPS = {
    "linear attention": (ops.gated_linear_attention, attention_loop, first(40, inputs())),
    "by key": (ops.gated_linear_attention, attention_loop, first(40, inputs(True))),
    "delta rule": (
        ops.gated_delta_rule,
        delta_loop,
        first(40, (*inputs(), rows(SEQ, HEADS, seed=9).sigmoid())),
    ),
    "ssd": (
        lambda x, dt, A, B, C, D, **options: ops.ssd(x, dt, A, B, C, D=D, **options),
        ssd_loop,
        ssd_inputs(40),
    ),
    "short_conv": (ops.short_conv, conv_loop, (rows(40, 5), rows(5, 4, seed=1), rows(5, seed=2))),
}


@pytest.mark.parametrize("name", LOOPS)
def test_rows_at_once_are_each_by_itself(name):
    """Under `vmap` over rows of the first input, the others being shared."""
    op, loop, (x, *rest) = LOOPS[name]
    many = torch.stack([x, -0.5 * x.flip(0)])
    got = torch.func.vmap(lambda x: op(x, *rest))(many)
    want = torch.stack([loop(x, *rest) for x in many])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "remat"),
    [*((name, False) for name in LOOPS), *((name, True) for name in LOOPS if name != "short_conv")],
)
def test_derivatives_are_those_of_a_loop(name, remat):
    """Of the first order by every input over several chunks, and of the second along one line."""
    op, loop, args = LOOPS[name]
    along = tuple(torch.ones_like(x) for x in args)
    weights = rows(*loop(*args).shape, seed=8)
    op = functools.partial(op, remat=remat) if name != "short_conv" else op

    def loss(f, *args):
        return (f(*args) * weights).square().sum()

    def derivatives(f):
        of = functools.partial(loss, f)
        grads = torch.func.grad(of, argnums=tuple(range(len(args))))
        return torch.func.jvp(grads, args, along)  # the gradients, and how they change

    torch.testing.assert_close(derivatives(op), derivatives(loop), rtol=1e-9, atol=1e-9)


def test_bfloat16_keeps_its_state_in_float32():
    args = [x.bfloat16() for x in inputs()]
    y = ops.gated_linear_attention(*args)
    assert y.dtype == torch.bfloat16
    want = attention_loop(*(x.double() for x in args))
    torch.testing.assert_close(y.double(), want, rtol=8e-3, atol=8e-3)
