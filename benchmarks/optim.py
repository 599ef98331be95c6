"""Optimisers beside torch.optim: time of a step, and memory beside weights, gradients and state.

    python -m benchmarks.optim [--layers N] [--device cpu|cuda] [--dtype NAME] [--only NAME ...]
                               [--json FILE]

SmolLM2-135M's parameters, or some of its layers; gradients are random. Each case is a process of
its own; its memory is the most that was allocated at once during a step: weights, gradients, state
and what the step needs beside them. Torch has no Lion: there the donated one is held against the
pure one.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

import funcmodels as fm
from benchmarks.allocated import peak_of
from benchmarks.table import Row, report
from benchmarks.train_task import HF
from funcmodels.models import llama

CASES = ("adamw", "sgd", "muon", "lion")
SIDES = ("torch.optim", "donated", "pure")
LR = 1e-4


def ours(case: str, model: fm.Model) -> fm.optim.Optimizer:
    if case == "muon":
        matrices = fm.optim.matrices(model)
        return fm.optim.muon(LR, matrices, rest=fm.optim.adamw(LR))
    if case == "sgd":
        return fm.optim.sgd(LR, momentum=0.9)
    return {"adamw": fm.optim.adamw, "lion": fm.optim.lion}[case](LR)


def theirs(case: str, model: fm.Model, weights: dict[str, torch.Tensor]) -> Any:
    if case == "adamw":
        return [torch.optim.AdamW(weights.values(), lr=LR, fused=True)]
    if case == "sgd":
        return [torch.optim.SGD(weights.values(), lr=LR, momentum=0.9, fused=True)]
    hidden = fm.optim.matrices(model)
    matrices = []
    for path, w in weights.items():
        if path in hidden:  # torch's Muon takes two dims: as the checkpoint holds them
            first = 0 if path.endswith((".q", ".k", ".v")) else 1
            matrix = w.detach().flatten(first, first + w.ndim - 2)
            assert w.grad is not None
            matrix.grad = w.grad.view(matrix.shape)
            matrices.append(matrix)
    rest = [w for path, w in weights.items() if path not in hidden]
    return [torch.optim.Muon(matrices, lr=LR), torch.optim.AdamW(rest, lr=LR, fused=True)]


def extra_of(step: Callable[[], None], device: str) -> int:
    """The bytes that a step needs beside what lies there before it."""
    if device == "cpu":
        return peak_of(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def stepper(
    side: str, case: str, model: fm.Model, weights: Any, grads: Any
) -> tuple[Callable[[], None], Callable[[], int]]:
    """A step, and the bytes of the state after it."""
    if side == "torch.optim":
        by_path = dict(fm.tree.items(weights))
        for w, g in zip(by_path.values(), fm.tree.leaves(grads), strict=True):
            w.grad = g
        optimizers = theirs(case, model, by_path)

        def state() -> int:
            held = [each for o in optimizers for each in o.state.values()]
            return sum(t.nbytes for each in held for t in each.values() if t.dim())

        return lambda: [optimizer.step() for optimizer in optimizers] and None, state
    optimizer = ours(case, model)
    now = [weights, optimizer.init(weights)]

    def step() -> None:
        now[:] = optimizer.update(grads, now[1], now[0], donate=side == "donated")

    return step, lambda: sum(t.nbytes for t in fm.tree.leaves(now[1]) if t.dim())


def measure(side: str, case: str, layers: int, device: str, dtype: str) -> dict[str, float]:
    """Seconds of a step; and bytes of it, beside weights and gradients, and of weights."""
    model = llama.model(llama.Config.from_hf({**HF, "num_hidden_layers": layers}))
    make = {"dtype": getattr(torch, dtype), "device": device}
    weights = fm.init(model, seed=0, **make)
    grads = fm.tree.map(lambda w: torch.randn_like(w) * 1e-3, weights)
    step, state = stepper(side, case, model, weights, grads)
    del weights
    times = []
    for _ in range(7):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    of_weights = sum(g.nbytes for g in fm.tree.leaves(grads))
    extra = extra_of(step, device)
    return {"seconds": median(times[2:]), "extra": extra, "state": state(), "weights": of_weights}


def to_rows(case: str, found: dict[str, dict[str, float]]) -> list[Row]:
    """Time and memory of the donated step, against torch's where there is one: less is better."""
    peer = "torch.optim" if "torch.optim" in found else "pure"
    rows = []
    for what, unit, figure in (
        ("a step", "ms", lambda row: row["seconds"] * 1e3),
        ("memory", "MB", lambda row: (2 * row["weights"] + row["state"] + row["extra"]) / 1e6),
        ("extra memory", "MB", lambda row: row["extra"] / 1e6),
    ):
        each = {side: figure(row) for side, row in found.items()}
        mine, its = each.pop("donated"), each.pop(peer)
        ratio = its / mine if what != "extra memory" else (its + 1) / (mine + 1)
        rows.append(Row(f"{case}, {what}", mine, its, peer, ratio, unit, each))
    return rows


def main(
    layers: Annotated[int, typer.Option(help="Of the 30 there are.")] = 30,
    device: str = "cpu",
    dtype: str = "float32",
    only: Annotated[list[str] | None, typer.Option(help="adamw, sgd, muon, lion")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the rows to this file")
    ] = None,
    case: Annotated[str, typer.Option(help="Internal: measure this one, here.")] = "",
) -> None:
    if case:
        side, name = case.split("/")
        print(json.dumps(measure(side, name, layers, device, dtype)))
        return
    rows = []
    for name in only or CASES:
        found = {}
        for side in SIDES:
            if (side, name) == ("torch.optim", "lion"):
                continue  # torch has none
            command = [sys.executable, "-m", "benchmarks.optim", "--case", f"{side}/{name}"]
            command += ["--layers", str(layers), "--device", device, "--dtype", dtype]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[side] = json.loads(said.splitlines()[-1])
        rows += to_rows(name, found)
    report(f"Optimisers, SmolLM2-135M of {layers} layers, {dtype}, {device}", rows, json_file)


if __name__ == "__main__":
    typer.run(main)
