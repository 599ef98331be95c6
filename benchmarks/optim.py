"""Optimisers beside torch.optim: time of a step, and memory beside weights, gradients and state.

    python -m benchmarks.optim [--layers N] [--device cpu|cuda] [--dtype NAME]

SmolLM2-135M's parameters, or some of its layers; gradients are random. Each case is a process of
its own; its extra memory is the most that was allocated (CUDA) or resident (CPU) during steps, less
what was there before them.
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
from rich.console import Console
from rich.table import Table

import funcmodels as fm
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


def resident(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew


def stepper(side: str, case: str, model: fm.Model, weights: Any, grads: Any) -> Callable[[], None]:
    if side == "torch.optim":
        by_path = dict(fm.tree.items(weights))
        for w, g in zip(by_path.values(), fm.tree.leaves(grads), strict=True):
            w.grad = g
        optimizers = theirs(case, model, by_path)
        return lambda: [optimizer.step() for optimizer in optimizers] and None
    optimizer = ours(case, model)
    now = [weights, optimizer.init(weights)]

    def step() -> None:
        now[:] = optimizer.update(grads, now[1], now[0], donate=side == "donated")

    return step


def measure(side: str, case: str, layers: int, device: str, dtype: str) -> dict[str, float]:
    """Seconds of a step, and bytes beside what lies there between steps."""
    model = llama.model(llama.Config.from_hf({**HF, "num_hidden_layers": layers}))
    make = {"dtype": getattr(torch, dtype), "device": device}
    weights = fm.init(model, seed=0, **make)
    grads = fm.tree.map(lambda w: torch.randn_like(w) * 1e-3, weights)
    step = stepper(side, case, model, weights, grads)
    del weights
    for _ in range(2):
        step()
    reset(device)
    before, times = resident(device), []
    for _ in range(5):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    bytes_of_weights = sum(g.nbytes for g in fm.tree.leaves(grads))
    extra = peak(device) - before
    return {"seconds": median(times), "extra": extra, "weights": bytes_of_weights}


def main(
    layers: Annotated[int, typer.Option(help="Of the 30 there are.")] = 30,
    device: str = "cpu",
    dtype: str = "float32",
    case: Annotated[str, typer.Option(help="Internal: measure this one, here.")] = "",
) -> None:
    if case:
        side, name = case.split("/")
        print(json.dumps(measure(side, name, layers, device, dtype)))
        return
    table = Table("optimiser", "side", "ms a step", "extra memory, MiB", "of the weights")
    for name in CASES:
        for side in SIDES:
            if (side, name) == ("torch.optim", "lion"):
                continue  # torch has none
            command = [sys.executable, "-m", "benchmarks.optim", "--case", f"{side}/{name}"]
            command += ["--layers", str(layers), "--device", device, "--dtype", dtype]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            row = json.loads(said.splitlines()[-1])
            table.add_row(
                name,
                side,
                f"{row['seconds'] * 1e3:.1f}",
                f"{row['extra'] / 2**20:.1f}",
                f"{row['extra'] / row['weights']:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
