"""vLLM's kernels, as served recurrences call them, against the ops' own steps, token by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from compiler.vllm_recurrent_batch import batch_of
from funcmodels.ops.delta_rule import step as delta_step
from funcmodels.ops.delta_rule import unit_step
from funcmodels.ops.short_conv import step as conv_step
from funcmodels.ops.ssd import step as ssd_step
from tests.engine.harness import run_in_engine

# Of each request: tokens of before, which its state holds, and new ones; those with one come first.
REQUESTS = [(5, 1), (0, 1), (9, 1), (0, 7), (3, 70), (0, 2), (64, 129)]
DTYPES = (torch.float32, torch.bfloat16)


def conv_case(dtype: torch.dtype, width: int, *, bias: bool, drawn: torch.Generator) -> Any:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn).to(dtype)

    # Of one token each, 3 x 64 values go one way, and 3 x 3072 the other.
    n, channels = sum(new for _, new in REQUESTS), 64 if bias else 3072
    params = [random(channels, width)] + ([random(channels)] if bias else [])
    names = ("weight", "bias")
    return "x", (width - 1, channels), dtype, [random(n, channels)], params, None, names


def ssd_case(dtype: torch.dtype, groups: int, *, skip: bool, drawn: torch.Generator) -> Any:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn)

    n, heads, head_dim, size = sum(new for _, new in REQUESTS), 4, 32, 64
    x, B, C = (random(n, *s).to(dtype) for s in ((heads, head_dim), *((groups, size),) * 2))
    dt, A = random(n, heads).exp(), -random(heads).exp()
    params = [A] + ([random(heads)] if skip else [])
    names = ("x", "dt", "B", "C")
    return "h", (heads, head_dim, size), torch.float32, [x, dt, B, C], params, names, ("A", "D")


def delta_case(size: int, *, unit: bool, drawn: torch.Generator) -> Any:
    """Keys of length 1, in one case or the other by the kernel."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn((sum(new for _, new in REQUESTS), *shape), generator=drawn)

    heads = 4
    q, k, v = (random(heads, size) for _ in range(3))
    q, k = (q, k) if unit else (F.normalize(x, dim=-1) for x in (q, k))
    beta = random(heads).sigmoid()
    xs = [*(x.bfloat16() for x in (q, k, v)), -0.3 * random(heads).exp(), beta.bfloat16()]
    shape = (heads, size, size)
    return "S", shape, torch.float32, xs, [], ("q", "k", "v", "g", "beta"), ()


def errors() -> dict[str, float]:
    """Of each case: the largest error of results and states, relative to the largest value."""
    from compiler import vllm_recurrent_kernels as served

    drawn = torch.Generator().manual_seed(0)
    found = {}
    for dtype in DTYPES:
        for width in (3, 4, 6):
            for bias in (True, False):
                case = conv_case(dtype, width, bias=bias, drawn=drawn)
                what = f"conv {dtype} width {width} bias {bias}"
                found[what] = error_of(served.ShortConvKernel, conv_step, *case)
        for groups in (1, 2, 4):
            case = ssd_case(dtype, groups, skip=groups != 2, drawn=drawn)
            what = f"ssd {dtype} groups {groups}"
            found[what] = error_of(served.StateSpaceKernel, ssd_step, *case)
    for size in (64, 128):
        for unit in (True, False):
            case = delta_case(size, unit=unit, drawn=drawn)
            kernel = served.UnitDeltaRuleKernel if unit else served.DeltaRuleKernel
            step = unit_step if unit else delta_step
            found[f"delta {size} unit {unit}"] = error_of(kernel, step, *case)
    return found


def error_of(
    kernel: Any,
    step: Any,
    held: str,
    shape: tuple[int, ...],
    state_dtype: torch.dtype,
    xs: list[torch.Tensor],
    params: list[torch.Tensor],
    x_names: tuple[str, ...] | None,
    param_names: tuple[str, ...],
) -> float:
    drawn = torch.Generator().manual_seed(1)
    pages = torch.randn((len(REQUESTS) + 4, 2, *shape), generator=drawn).to(state_dtype)
    cache = pages[:, 1]  # as in the engine, where a page holds more than one state
    places = torch.randperm(len(cache), generator=drawn)[: len(REQUESTS)]
    for place, (before, _) in zip(places.tolist(), REQUESTS, strict=True):
        if before == 0:
            cache[place] = 0
    kept = cache.clone()
    ends = torch.tensor([0] + [new for _, new in REQUESTS]).cumsum(0)
    metadata = SimpleNamespace(
        query_start_loc=ends.int(),
        state_indices_tensor=places.int(),
        seq_lens=torch.tensor([before + new for before, new in REQUESTS]),
    )
    batch = batch_of(metadata)
    assert batch_of(metadata) is batch
    assert batch.new == [
        p for p, (old, _) in zip(places.tolist(), REQUESTS, strict=True) if not old
    ]
    n = batch.num_decodes
    assert kernel.fits((cache,), xs, params)
    result = torch.full_like(xs[0], float("nan"))
    (result[:n],) = kernel.step((cache,), batch, [x[:n] for x in xs], params)
    kernel.prefill((cache,), batch, [x[n:] for x in xs], params, [result[n:]])

    wide = [x.double() for x in xs]
    given = dict(zip(param_names, (p.double() for p in params), strict=False))
    expected, states = torch.empty(result.shape, dtype=torch.float64), kept.double()
    for place, first, last in zip(places.tolist(), ends.tolist(), ends[1:].tolist(), strict=False):
        carry = {held: states[place]}
        for t in range(first, last):
            x = (
                wide[0][t]
                if x_names is None
                else {k: v[t] for k, v in zip(x_names, wide, strict=True)}
            )
            carry, expected[t] = step(carry, x, *([given] if given else []))
        states[place] = carry[held]

    def error(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one.double() - other).abs().max() / other.abs().max())

    return max(error(result, expected), error(cache, states))


def test_kernels():
    found = run_in_engine(errors)
    assert len(found) == len(DTYPES) * (3 * 2 + 3) + 2 * 2
    for what, error in found.items():
        assert error < (1e-5 if "float32" in what else 8e-3), (what, error)  # bfloat16: 2^-7
