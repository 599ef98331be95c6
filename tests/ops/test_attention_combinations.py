"""Random combinations of everything that `ops.attention` can be asked for: right, or refused.

`test_attention.py` has every combination of the options at one size. Here sizes, dtypes, scales and
the kernel are drawn as well, and the oracle is float64 over whole matrices, without a mask that
depends on `-inf`, with torch's own derivatives.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import KernelError, ShapeError

# Of the largest value of each tensor. float16 and bfloat16 round the inputs' products to 2**-11 and
# 2**-8; a sum of up to 24 such, and a backward through them, is some of these.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 3e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}
RAN = {"right": 0, "refused": 0}


def reference(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, slopes: Tensor | None, o: dict[str, Any]
) -> Tensor:
    """The docstring's formula, each head at once; (*batch, seq, heads, dv), in float64."""
    seq, heads, d = q.shape[-3:]
    k, v = (x.repeat_interleave(heads // k.shape[-2], -2) for x in (k, v))
    scale = d**-0.5 if o["scale"] is None else o["scale"]
    s = scale * torch.einsum("...ihd,...jhd->...hij", q, k)
    if o["softcap"] is not None:
        s = o["softcap"] * torch.tanh(s / o["softcap"])
    i, j = torch.arange(seq)[:, None], torch.arange(seq)[None]
    if slopes is not None:
        s = s + slopes[:, None, None] * (j - i)
    seen = (j <= i) if o["causal"] else torch.ones(seq, seq, dtype=torch.bool)
    if o["window"] is not None:
        seen = seen & ((i - j).abs() < o["window"])
    if (ids := o["segment_ids"]) is not None:
        seen = seen & (ids[..., None, :, None] == ids[..., None, None, :])
    top = s.detach().masked_fill(~seen, -1e30).amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.detach()[:, None, None])
    e = torch.exp((s - top).masked_fill(~seen, -1e4)) * seen
    total = e.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None, None] - top)
    return torch.einsum("...hij,...jhd->...ihd", e / total, v)


def maybe(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | values


CALLS = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([(), (1,), (2,), (2, 2)]),
        "seq": st.integers(1, 24),
        "heads": st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1), (6, 2), (8, 1), (4, 3)]),
        "d": st.sampled_from([1, 3, 8, 16]),
        "dv": st.sampled_from([1, 4, 8, 24]),
        "dtype": st.sampled_from(list(TOLERANCE)),
        "causal": st.booleans(),
        "scale": maybe(st.sampled_from([0.0, 0.3, -0.7, 2.0])),
        "window": maybe(st.sampled_from([0, 1, 2, 3, 5, 8, 13, 21, 30])),
        "softcap": maybe(st.sampled_from([0.0, 0.2, 0.5, 1.0, 3.0, 5.0, 20.0, 50.0])),
        "sinks": st.booleans(),
        "alibi_slopes": st.sampled_from([None, "tensor", "numbers"]),
        "segment_ids": maybe(st.sampled_from(["runs", "mixed", "one"])),
        "kernel": st.sampled_from([None] * 7 + ["reference", "cpu_flash", "flex"]),
        "seed": st.integers(0, 2**31),
    }
)


def segments(kind: str | None, batch: tuple[int, ...], seq: int) -> Tensor | None:
    if kind is None:
        return None
    ids = torch.randint(0, 1 if kind == "one" else 3, (*batch, seq))
    return ids.sort(-1).values if kind == "runs" else ids


def must_refuse(c: dict[str, Any]) -> type[Exception] | None:
    """What the documentation says of a call that cannot be."""
    heads, kv_heads = c["heads"]
    if heads % kv_heads or c["window"] == 0 or c["softcap"] == 0:
        return ShapeError
    if c["kernel"] == "flex" or (c["kernel"] == "cpu_flash" and c["softcap"] is not None):
        return KernelError
    return None


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(CALLS)
def check(c: dict[str, Any]) -> None:
    torch.manual_seed(c["seed"])
    heads, kv_heads = c["heads"]
    dtype, lead = c["dtype"], (*c["batch"], c["seq"])
    shapes = (*lead, heads, c["d"]), (*lead, kv_heads, c["d"]), (*lead, kv_heads, c["dv"])
    leaves = [(1.5 * torch.randn(s)).to(dtype) for s in shapes]
    leaves += [torch.randn(heads).to(dtype)] * c["sinks"]
    leaves += [torch.rand(heads).to(dtype)] * (c["alibi_slopes"] is not None)
    o = {n: c[n] for n in ("causal", "scale", "window", "softcap")}
    o["segment_ids"] = segments(c["segment_ids"], c["batch"], c["seq"])
    weight = torch.randn(*lead, heads, c["dv"]).to(dtype)

    def run(is_op: bool, to: torch.dtype) -> tuple[Tensor, ...]:
        xs = [x.to(to).requires_grad_() for x in leaves]
        sinks = xs[3] if c["sinks"] else None
        slopes = xs[-1] if c["alibi_slopes"] else None
        if not is_op:
            out = reference(*xs[:3], sinks, slopes, o)
        else:
            numbers = c["alibi_slopes"] == "numbers"
            given_slopes = tuple(slopes.tolist()) if numbers else slopes
            out = ops.attention(*xs[:3], sinks=sinks, alibi_slopes=given_slopes, **o)
        by = xs[:-1] if c["alibi_slopes"] == "numbers" else xs
        return out, *torch.autograd.grad((out * weight.to(to)).sum(), by)

    error = must_refuse(c)
    with fm.attention_kernel(c["kernel"]), pytest.raises(error) if error else nullcontext():
        got = run(True, dtype)
    if error:
        RAN["refused"] += 1
        return
    want = run(False, torch.float64)
    assert len(got) == len(want)
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == dtype
        assert torch.isfinite(a).all()
        size = max(1.0, b.abs().max().item())
        off = (a.double() - b).abs().max().item() / size
        assert off < TOLERANCE[dtype], f"tensor {n} is off by {off:.1e} of {size:.1e}"
    RAN["right"] += 1


def test_combinations_are_right_or_refused():
    RAN.update(right=0, refused=0)
    check()
    print(f"{RAN['right']} combinations were right, {RAN['refused']} refused")
    assert RAN["right"] >= 200  # none of these can pass by being refused
    assert RAN["refused"] >= 50
