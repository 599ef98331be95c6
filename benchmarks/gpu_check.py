"""Every kernel of `ops.attention` on the GPU, in bfloat16, against float64 written out.

The error is ‖got - want‖ / ‖want‖, the largest over the output and all gradients; the inputs are
rounded to bfloat16 before both.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import funcmodels as fm
from benchmarks.gpu_time import BACKEND, BF16, DEVICE, progress
from benchmarks.table import Row
from funcmodels import ops
from funcmodels.errors import KernelError
from funcmodels.ops.attention_kernels import KERNELS

BOUND = 0.01  # of bfloat16 operands; what is wrong is off by 1
UNIT = "relative error"
HEADS, DIM = 8, 64
TRANSFORMS = "transforms"
DOCUMENTS = ((100, 28, 300, 84), (512,))  # tokens of each, by row

CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "all see all": {"causal": False},
    "GQA": {"kv_heads": 2},
    "d 128": {"d": 128, "dv": 128},
    "d 256, dv 192": {"d": 256, "dv": 192},
    "d 72, dv 40": {"d": 72, "dv": 40},
    "window": {"window": 100},
    "window, all see all": {"window": 100, "causal": False},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
    "ALiBi": {"alibi_slopes": tuple(2.0 ** -(i + 1) for i in range(HEADS))},
    "packed": {"packed": "runs"},
    "packed, GQA, window, sinks": {"packed": "runs", "kv_heads": 2, "window": 50, "sinks": True},
    "packed, ids come back": {"packed": "scattered"},
    "packed, GQA, window, sinks, softcap, ids come back": {
        "packed": "scattered", "kv_heads": 2, "window": 50, "sinks": True, "softcap": 20.0,
    },
}  # fmt: skip


Processes = dict[str, tuple[subprocess.Popen, Path]]


def start() -> Processes:
    """A process for each kernel: most of it is compiling, and what one breaks stays its own."""
    started = {}
    for name in (*KERNELS, TRANSFORMS):
        file = Path(tempfile.mkstemp(suffix=".jsonl")[1])
        command = [sys.executable, "-m", "benchmarks.gpu_check", name]
        with file.open("w") as out:
            started[name] = subprocess.Popen(command, stdout=out), file
    return started


def finish(started: Processes) -> list[Row]:
    """All their rows, and one for each process that died."""
    rows = []
    for name, (process, file) in started.items():
        code = process.wait()
        rows += [Row(**json.loads(line)) for line in file.read_text().splitlines()]
        if code:
            rows.append(_row(f"{name}: died with {code}", math.inf))
        progress(f"checked {name}")
    return rows


def check(name: str) -> Iterator[Row]:
    """A row for each case that the kernel has, or for each transform."""
    if name == TRANSFORMS:
        yield from (_row(f"chosen: {what}", error) for what, error in _transforms())
        return
    for what, options in CASES.items():
        try:
            with fm.attention_kernel(name):
                error = _error(options)
        except KernelError:
            continue
        yield _row(f"{name}: {what}", error)


def _row(what: str, error: float) -> Row:
    return Row(what, error, BOUND, "bound", BOUND / error, UNIT)


def _error(options: dict[str, Any]) -> float:
    """Of the output and of the gradients by q, k, v and the sinks."""
    leaves, rules = _inputs(**options)
    weight = _random(2, 512, HEADS, leaves[2].shape[-1])

    def run(fn: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        xs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = fn(*xs, **rules)
        return [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), xs)]

    return _largest(run(_attention, BF16), run(_written_out, torch.float64))


def _transforms() -> Iterator[tuple[str, float]]:
    """The chosen kernel, packed, under what torch.func and torch.compile make of it."""
    leaves, rules = _inputs(packed="runs", kv_heads=2, window=50, sinks=True)
    weight = _random(2, 512, HEADS, DIM)
    by = tuple(range(len(leaves)))
    wide = [x.double() for x in leaves]

    def loss(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of(*xs: Tensor) -> Tensor:
            return (fn(*xs, **rules) * weight.to(xs[0].dtype)).sum()

        return of

    want = grad(loss(_written_out), by)(*wide)
    yield "grad", _largest(grad(loss(_attention), by)(*leaves), want)
    compiled = torch.compile(grad(loss(_attention), by), fullgraph=True, backend=BACKEND)
    yield "compile(grad)", _largest(compiled(*leaves), want)
    axes = (0, 0, 0, None)
    many = [x if d is None else torch.stack([x, 2 * x]) for x, d in zip(leaves, axes, strict=True)]
    samples = vmap(grad(loss(_attention), by), axes)(*many)
    for i in range(2):
        one = [x.double() if d is None else x[i].double() for x, d in zip(many, axes, strict=True)]
        want = grad(loss(_written_out), by)(*one)
        yield f"vmap(grad), sample {i}", _largest([g[i] for g in samples], want)
    along = [_random(*x.shape) for x in leaves]
    got = jvp(lambda *xs: _attention(*xs, **rules), tuple(leaves), tuple(along))
    right = jvp(lambda *xs: _written_out(*xs, **rules), tuple(wide),
                tuple(t.double() for t in along))  # fmt: skip
    yield "jvp", _largest(got, right)


def _attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **rules: Any):
    return ops.attention(q, k, v, sinks=sinks, **rules)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, *, causal: bool = True,
    window: int | None = None, softcap: float | None = None,
    alibi_slopes: tuple[float, ...] | None = None, segment_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition, with all scores in memory; independent of the code under test."""
    group = q.shape[-2] // k.shape[-2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, heads, seq, d)
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(q.shape[2], device=q.device)
    back = place[:, None] - place[None, :]  # how far the key is behind the query
    if alibi_slopes is not None:
        scores = scores - torch.tensor(alibi_slopes, device=q.device)[:, None, None] * back
    seen = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    if window is not None:
        seen = seen & (back.abs() < window)
    if segment_ids is not None:
        seen = seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sink = sinks[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), dim=-1)
    return (scores.softmax(-1)[..., : q.shape[2]] @ v).transpose(1, 2)


def _inputs(
    *,
    kv_heads: int = HEADS,
    d: int = DIM,
    dv: int = DIM,
    packed: str | None = None,
    sinks: bool = False,
    **rules: Any,
) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v and perhaps sinks in bfloat16, and the other arguments."""
    torch.manual_seed(0)
    leaves = [_random(2, 512, h, n) for h, n in ((HEADS, d), (kv_heads, d), (kv_heads, dv))]
    if sinks:
        leaves.append(_random(HEADS))
    if packed is not None:
        ids = [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in DOCUMENTS]
        rules["segment_ids"] = torch.stack(ids).to(DEVICE)
        if packed == "scattered":
            rules["segment_ids"] = rules["segment_ids"] % 2
    return leaves, rules


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(BF16)


def _largest(got: Any, want: Any) -> float:
    """The largest relative error of the tensors of two sequences."""
    pairs = zip(got, want, strict=True)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


if __name__ == "__main__":
    for found in check(sys.argv[1]):
        print(json.dumps(asdict(found)), flush=True)
