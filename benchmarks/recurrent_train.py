"""Training of recurrences: forward and backward of each, against `transformers`' own torch path.

    python -m benchmarks.recurrent_train [--quick] [--rounds 15] [--json FILE]

Rows: each ready-made form of `funcmodels.ops` against the same recurrence in `transformers`; a
user's chunked form against the ready-made one; and `remat` against none, in speed and in memory.

Both sides run in this process, on one thread, on the same float32 values; results and gradients
must agree. They take turns, and time is the processor's, so that other work on the machine does not
count. Memory is the largest resident memory of a forked process while it takes one step, less what
it had before: gradients, and copies of what is laid out anew, with what is kept for backward.
"""

import functools
import gc
import inspect
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from einops import einsum
from rich.console import Console
from torch import Tensor

import funcmodels as fm
from benchmarks.table import Row, compare, report
from benchmarks.train_side import _forget_peak, _peak
from funcmodels import ops
from funcmodels.ops.linear_attention import decay_between

HEADS, DIM = 8, 128  # of linear attention and the delta rule: an eighth of Qwen3-Next's heads
CLOSE = 1e-4  # of the largest value: float32, in other orders

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A recurrence: its arguments, and what computes it. The first side is ours."""

    what: str
    inputs: dict[str, Tensor]
    sides: dict[str, Call]


# --- what a user writes --------------------------------------------------------------------------


def delta_step(state: Any, x: Any) -> Any:
    S = state["S"] * x["g"].exp()[..., None, None]
    held = einsum(x["k"], S, "... h k, ... h k v -> ... h v")
    change = x["beta"][..., None] * (x["v"] - held)
    S = S + einsum(x["k"], change, "... h k, ... h v -> ... h k v")
    return {"S": S}, einsum(x["q"], S, "... h k, ... h k v -> ... h v")


def delta_chunked(state: Any, x: Any) -> Any:
    """The delta rule as its paper has it, in einsums."""
    S, q, k, v, beta = state["S"], x["q"], x["k"], x["v"], x["beta"][..., None]
    since = x["g"].cumsum(-2).exp()[..., None]
    between = decay_between(x["g"].movedim(-1, -2))
    alike = einsum(k * beta, k, "... t h k, ... s h k -> ... h t s")
    wanted = beta * (v - einsum(k * since, S, "... t h k, ... h k v -> ... t h v"))
    change = torch.linalg.solve_triangular(
        alike * between, wanted.movedim(-3, -2), upper=False, unitriangular=True
    )
    scores = einsum(q, k, "... t h k, ... s h k -> ... h t s") * between
    y = einsum(scores, change, "... h t s, ... h s v -> ... t h v")
    y = y + einsum(q * since, S, "... t h k, ... h k v -> ... t h v")
    S = S * since[..., -1, :, :, None]
    left = change * between[..., -1, :, None]
    return {"S": S + einsum(k, left, "... s h k, ... h s v -> ... h k v")}, y


def linear_step(state: Any, x: Any) -> Any:
    S = state["S"] * x["g"].exp()[..., None, None]
    S = S + einsum(x["k"], x["v"], "... h k, ... h v -> ... h k v")
    return {"S": S}, einsum(x["q"], S, "... h k, ... h k v -> ... h v")


def key_step(state: Any, x: Any) -> Any:
    S = state["S"] * x["g"].exp()[..., None]
    S = S + einsum(x["k"], x["v"], "... h k, ... h v -> ... h k v")
    return {"S": S}, einsum(x["q"], S, "... h k, ... h k v -> ... h v")


def linear_chunked(state: Any, x: Any) -> Any:
    S, q, k, v = state["S"], x["q"], x["k"], x["v"]
    since = x["g"].cumsum(-2).exp()[..., None]
    between = decay_between(x["g"].movedim(-1, -2))
    scores = einsum(q, k, "... t h k, ... s h k -> ... h t s") * between
    y = einsum(scores, v, "... h t s, ... s h v -> ... t h v")
    y = y + einsum(q * since, S, "... t h k, ... h k v -> ... t h v")
    S = S * since[..., -1, :, :, None]
    left = k * between[..., -1, :].movedim(-1, -2)[..., None]
    return {"S": S + einsum(left, v, "... s h k, ... s h v -> ... h k v")}, y


MEMORY = fm.state(S="heads key value", dtype=torch.float32, heads=HEADS, key=DIM, value=DIM)


def of_user(step: Any, chunked: Any, chunk: int = 64) -> Call:
    """A recurrence that a user has written."""

    def run(**xs: Tensor) -> Tensor:
        return ops.recurrent(step, MEMORY, xs, chunked=chunked, chunk=chunk)

    return run


# --- what `transformers` has ---------------------------------------------------------------------


def plain(fn: Any) -> Any:
    """The torch path itself, without what looks for a kernel to put in its place."""
    return inspect.unwrap(fn)


def peer_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    # It scales the queries itself.
    return plain(theirs.torch_chunk_gated_delta_rule)(q * DIM**0.5, k, v, g, beta)[0]


def peer_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from transformers.models.mamba2 import modeling_mamba2 as theirs

    return plain(theirs.mamba2_chunk_scan)(x, dt, A, B, C, 256, D=D)


def peer_linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Mamba-2's path with a decay of g: it has no other with a decay for each token."""
    from transformers.models.mamba2 import modeling_mamba2 as theirs

    minus = torch.full((HEADS,), -1.0)
    return plain(theirs.mamba2_chunk_scan)(v / -g[..., None], -g, minus, k, q, 256)


def peer_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from transformers.models.lfm2 import modeling_lfm2 as theirs

    return plain(theirs.causal_conv1d_fn)(x.mT, weight, bias).mT


# --- cases ---------------------------------------------------------------------------------------


def cases(tokens: int) -> list[Case]:
    """Each recurrence, of one row of tokens."""
    torch.manual_seed(0)
    normal = torch.randn
    heads = (1, tokens, HEADS)
    q, k, v = (normal(*heads, DIM) for _ in range(3))
    qkv = {"q": q * DIM**-0.5, "k": F.normalize(k, dim=-1), "v": v}
    decay = -0.01 - torch.rand(heads)
    linear = qkv | {"g": decay}
    delta = linear | {"beta": torch.rand(heads)}
    mamba = {
        "x": normal(1, tokens, 24, 64),
        "dt": 0.1 * torch.rand(1, tokens, 24),
        "A": -8 * torch.rand(24),
        "B": normal(1, tokens, 1, 128),
        "C": normal(1, tokens, 1, 128),
        "D": normal(24),
    }

    def attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return ops.gated_linear_attention(q, k, v, g)

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return ops.gated_delta_rule(q, k, v, g, beta)

    theirs = "transformers"
    return [
        Case(
            "short convolution, LFM2",
            {"x": normal(1, tokens, 1024), "weight": normal(1024, 3)},
            {"ours": ops.short_conv, theirs: peer_conv},
        ),
        Case(
            "short convolution, Mamba-2",
            {"x": normal(1, tokens, 1792), "weight": normal(1792, 4), "bias": normal(1792)},
            {"ours": ops.short_conv, theirs: peer_conv},
        ),
        Case("Mamba-2 SSD", mamba, {"ours": ops.ssd, theirs: peer_ssd}),
        Case("gated linear attention", linear, {"ours": attention, theirs: peer_linear}),
        Case("gated delta rule", delta, {"ours": rule, theirs: peer_delta}),
        Case(
            "linear attention, decay by key",
            qkv | {"g": -torch.rand(*heads, DIM)},
            {"ours": attention, "its step alone": of_user(key_step, None)},
        ),
        Case(
            "linear attention, user's chunked",
            linear,
            {"user's": of_user(linear_step, linear_chunked), "ready-made": attention},
        ),
        Case(
            "delta rule, user's chunked",
            delta,
            {"user's": of_user(delta_step, delta_chunked, 32), "ready-made": rule},
        ),
    ]


def remat_cases(tokens: int) -> list[Case]:
    """What `remat` costs, and what it saves."""
    by_name = {case.what: case.inputs for case in cases(tokens)}
    found = []
    for name, op in (
        ("gated linear attention", ops.gated_linear_attention),
        ("gated delta rule", ops.gated_delta_rule),
    ):

        def run(op: Any = op, remat: bool = False, **xs: Tensor) -> Tensor:
            return op(*xs.values(), remat=remat)

        def again(run: Call = run, **xs: Tensor) -> Tensor:
            return run(remat=True, **xs)

        found.append(Case(f"{name}, remat", by_name[name], {"remat": again, "without": run}))
    return found


# --- measuring -----------------------------------------------------------------------------------


def step(call: Call, inputs: dict[str, Tensor]) -> tuple[float, Tensor, tuple[Tensor, ...]]:
    """Seconds of the processor, the result, and its gradients by all inputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    start = time.process_time()
    y = call(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent(y.shape))
    return time.process_time() - start, y.detach(), grads


@functools.cache  # made by `check`, before time counts
def cotangent(shape: tuple[int, ...]) -> Tensor:
    """The same weights for every side."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def check(case: Case) -> None:
    """Two sides that do not agree are two recurrences, and no ratio says anything of them."""
    found = []
    for call in case.sides.values():
        _, y, grads = step(call, case.inputs)
        found.append((y, *grads))
    for a, b in zip(*found, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error < CLOSE:
            raise RuntimeError(f"{case.what}: the sides differ by {error:.1g}")


def speed(case: Case, rounds: int) -> Row:
    """Tokens/s of ours against the other side."""
    check(case)
    tokens = next(iter(case.inputs.values())).shape[1]
    found: dict[str, list[float]] = {side: [] for side in case.sides}
    for turn in range(rounds):
        order = list(case.sides.items())
        for side, call in order if turn % 2 else reversed(order):
            gc.collect()
            found[side].append(tokens / step(call, case.inputs)[0])
    ours, *peers = found
    return compare(case.what, found[ours], {peer: found[peer] for peer in peers}, "tokens/s")


def memory(case: Case) -> Row:
    """The largest resident memory of one step, in MB: less is better."""
    ours, peer = (_in_a_fork(call, case.inputs) / 1e6 for call in case.sides.values())
    return Row(f"{case.what}, memory", ours, peer, list(case.sides)[1], peer / ours, "MB")


def kept(case: Case) -> Row:
    """What the backward pass needs beside the arguments, in MB: less is better."""
    ours, peer = (_saved(call, case.inputs) / 1e6 for call in case.sides.values())
    what = f"{case.what}, kept for backward"
    return Row(what, ours, peer, list(case.sides)[1], peer / ours, "MB")


def _saved(call: Call, inputs: dict[str, Tensor]) -> int:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    found: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = call(**leaves)
    del y
    own = {x.untyped_storage().data_ptr() for x in leaves.values()}
    return sum(size for at, size in found.items() if at not in own)


def _in_a_fork(call: Call, inputs: dict[str, Tensor]) -> int:
    context = multiprocessing.get_context("fork")
    ends = context.Pipe()

    def run() -> None:
        step(call, {name: x[:, :64] if x.ndim > 2 else x for name, x in inputs.items()})
        _forget_peak()
        before = _peak()
        step(call, inputs)
        ends[1].send(_peak() - before)

    process = context.Process(target=run)
    process.start()
    found = ends[0].recv()
    process.join()
    return found


def train_rows(*, quick: bool = False, rounds: int | None = None) -> list[Row]:
    """All rows, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tokens, turns = (512, 3) if quick else (2048, 15)
        again = remat_cases(tokens)
        # Memory first, before this process has held more itself.
        sizes = [row(case) for case in again for row in (memory, kept)]
        return [speed(case, rounds or turns) for case in [*cases(tokens), *again]] + sizes
    finally:
        torch.set_num_threads(threads)


def main(
    quick: Annotated[bool, typer.Option(help="a quarter of the tokens, few turns")] = False,
    rounds: Annotated[int | None, typer.Option(help="turns of each side")] = None,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
) -> None:
    """Tokens/s of recurrences, forwards and backwards."""
    rows = train_rows(quick=quick, rounds=rounds)
    report("Training of recurrences, float32, one thread", rows, json)
    slow = [row.what for row in rows if row.peer_name == "transformers" and row.ratio < 1.5]
    slow += [row.what for row in rows if row.peer_name == "ready-made" and row.ratio < 1 / 1.5]
    if slow:
        Console().print(f"below the aim: {', '.join(slow)}")


if __name__ == "__main__":
    typer.run(main)
