"""Values, gradients and errors of `ops.attention`, against float64 loops over heads and tokens."""

import itertools
import math

import pytest
import torch

from funcmodels import ops
from funcmodels.errors import ShapeError

BATCH, SEQ, DIM = 2, 5, 4
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
SCALE = 2.0  # of the inputs: probabilities far from uniform
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}


def dense(
    q, k, v, *, causal=True, scale=None, window=None, softcap=None, sinks=None, alibi_slopes=None,
    segment_ids=None,
):  # fmt: skip
    """The definition, one head and one query at a time: independent of the code under test."""
    batch, seq, heads, dim = q.shape
    group = heads // k.shape[2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    rows = []
    for b, i, h in itertools.product(range(batch), range(seq), range(heads)):
        logits, values = [], []
        for j in range(seq):
            if causal and j > i:
                continue
            if window is not None and abs(i - j) >= window:
                continue
            if segment_ids is not None and segment_ids[b, i] != segment_ids[b, j]:
                continue
            s = (q[b, i, h] * k[b, j, h // group]).sum() * scale
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            if alibi_slopes is not None:
                s = s + alibi_slopes[h] * (j - i)
            logits.append(s)
            values.append(v[b, j, h // group])
        if sinks is not None:
            logits.append(sinks[h])
            values.append(torch.zeros_like(values[0]))
        rows.append(torch.stack(logits).softmax(0) @ torch.stack(values))
    return torch.stack(rows).reshape(batch, seq, heads, v.shape[-1])


def inputs(heads="gqa", dv=DIM, dtype=torch.float64):
    h, kv = HEADS[heads]
    shapes = (h, DIM), (kv, DIM), (kv, dv)
    return [(SCALE * torch.randn(BATCH, SEQ, *s, dtype=torch.float64)).to(dtype) for s in shapes]


def options(causal, window, softcap, sinks, alibi, segments):
    return {
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "sinks": torch.randn(4, dtype=torch.float64) if sinks else None,
        "alibi_slopes": torch.rand(4, dtype=torch.float64) if alibi else None,
        "segment_ids": torch.tensor([[0, 0, 0, 1, 1], [3, 1, 1, 0, 3]]) if segments else None,
    }


def check(heads, dv, dtype, opts):
    """Output and all gradients, in dtype, against `dense` on the same numbers in float64."""
    leaves = inputs(heads, dv, dtype)
    opts = {n: t.to(dtype) if t is not None and n in ("sinks", "alibi_slopes") else t
            for n, t in opts.items()}  # fmt: skip
    names = [n for n in ("sinks", "alibi_slopes") if opts[n] is not None]
    leaves += [opts[n] for n in names]
    weight = torch.randn(BATCH, SEQ, 4, dv, dtype=torch.float64).to(dtype)

    def run(fn, to):
        xs = [t.detach().to(to).requires_grad_() for t in leaves]
        out = fn(*xs[:3], **{**opts, **dict(zip(names, xs[3:], strict=True))})
        return out, torch.autograd.grad((out * weight.to(to)).sum(), xs)

    out, grads = run(ops.attention, dtype)
    want, want_grads = run(dense, torch.float64)
    assert out.dtype == dtype
    for got, ref in zip((out, *grads), (want, *want_grads), strict=True):
        assert got.dtype == dtype
        size = ref.abs().max().clamp_min(1e-3)
        error = (got.double() - ref).abs().max() / size
        assert error < TOLERANCE[dtype], f"{error=}"


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_every_combination_of_options(causal, window, softcap, sinks, alibi, segments):
    check("gqa", DIM, torch.float64, options(causal, window, softcap, sinks, alibi, segments))


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dv", [DIM, 3, 6])
@pytest.mark.parametrize("heads", HEADS)
def test_head_layouts_and_widths(heads, dv, everything):
    opts = options(True, 3 if everything else None, None, *[everything] * 3)
    check(heads, dv, torch.float64, opts)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype, softcap, everything):
    opts = options(True, 3 if everything else None, softcap, everything, False, everything)
    check("gqa", DIM, dtype, opts)


def test_alibi_in_bfloat16_is_added_in_float32():
    # A bfloat16 bias would round distances above 256.
    q = torch.zeros(600, 1, 8, dtype=torch.bfloat16)
    v = torch.arange(600.0)[:, None, None].expand(600, 1, 8).bfloat16()
    out = ops.attention(q, q, v, alibi_slopes=(1.0,))
    bias = torch.arange(600.0).double() - 599
    want = bias.softmax(0) @ v[:, 0, 0].double()
    assert abs(out[-1, 0, 0].double() - want) < 2.01  # one unit in the last place at 600


def test_one_visible_key_returns_its_value():
    q, k, v = inputs()
    torch.testing.assert_close(
        ops.attention(q, k, v, window=1)[:, :, :2], v[:, :, :1].expand(2, SEQ, 2, 4)
    )


def test_uniform_scores_average_and_a_sink_takes_its_share():
    q, k, v = inputs("mha")
    zeros = torch.zeros_like(q)
    mean = v.cumsum(1) / torch.arange(1, SEQ + 1)[:, None, None]
    torch.testing.assert_close(ops.attention(zeros, k, v), mean)
    count = torch.arange(1, SEQ + 1)[:, None, None]
    sinks = torch.full((4,), math.log(3.0), dtype=q.dtype)
    torch.testing.assert_close(ops.attention(zeros, k, v, sinks=sinks), mean * count / (count + 3))


def test_scale_is_used():
    q, k, v = inputs()
    torch.testing.assert_close(ops.attention(q, k, v, scale=0.3), dense(q, k, v, scale=0.3))


def test_segments_equal_separate_sequences():
    q, k, v = (t[0] for t in inputs())
    ids = torch.tensor([0] * 2 + [1] * 3)
    parts = [ops.attention(q[s], k[s], v[s]) for s in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(ops.attention(q, k, v, segment_ids=ids), torch.cat(parts))


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_any_number_of_batch_dims(batch, softcap):
    q, k, v = (torch.randn(*batch, SEQ, h, DIM) for h in (4, 2, 2))
    ids = torch.randint(0, 2, (*batch, SEQ))
    sinks, slopes = torch.randn(4), (0.5, 0.25, 0.125, 0.0625)
    kwargs = {"sinks": sinks, "alibi_slopes": slopes, "softcap": softcap}
    got = ops.attention(q, k, v, segment_ids=ids, **kwargs)
    flat = [t.reshape(-1, *t.shape[len(batch) :]) for t in (q, k, v, ids)]
    want = dense(*flat[:3], segment_ids=flat[3], **kwargs)
    torch.testing.assert_close(got, want.reshape(got.shape))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_no_tokens(batch):
    q, k, v = (torch.randn(*batch, 0, h, DIM, requires_grad=True) for h in (4, 2, 2))
    sinks = torch.randn(4, requires_grad=True)
    out = ops.attention(q, k, v, sinks=sinks, window=2)
    assert out.shape == q.shape
    assert torch.autograd.grad(out.sum(), sinks)[0].tolist() == [0.0] * 4


def test_strided_inputs():
    q, k, v = (torch.randn(BATCH, DIM, h, SEQ).transpose(1, 3) for h in (4, 2, 2))
    torch.testing.assert_close(ops.attention(q, k, v), dense(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update({n: a[n][:, :, :1].expand(2, SEQ, 3, 4) for n in "kv"}),
         r"heads=4, kv_heads=3[\s\S]*fix: +kv_heads in \{1, 2, 4\}"),
        (lambda a: a.update(q=a["q"][..., :3]), r"differ in their last dim[\s\S]*project k to 3"),
        (lambda a: a.update(k=a["k"][:1]), r"leading dims \(2, 5\)"),
        (lambda a: a.update({n: a[n].transpose(1, 2) for n in "qkv"}), r"q.transpose\(-3, -2\)"),
        (lambda a: a.update(q=a["q"].float()), r"differ in dtype"),
        (lambda a: a.update({n: a[n][0, 0] for n in "qkv"}), r"need a dim for the sequence"),
        (lambda a: a.update(sinks=torch.zeros(2)), r"sinks \(2,\), 4 query heads"),
        (lambda a: a.update(alibi_slopes=(1.0,)), r"alibi_slopes \(1,\), 4 query heads"),
        (lambda a: a.update(segment_ids=torch.zeros(5)), r"segment_ids.expand\(2, 5\)"),
        (lambda a: a.update(window=0), r"window=0"),
        (lambda a: a.update(softcap=0.0), r"softcap=0.0"),
    ],
)  # fmt: skip
def test_errors_name_the_fix(change, message):
    arguments = dict(zip("qkv", inputs(), strict=True))
    change(arguments)
    with pytest.raises(ShapeError, match=message):
        ops.attention(**arguments)
