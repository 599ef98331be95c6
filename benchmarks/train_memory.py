"""Memory of the gradient alone: the peak of three calls that give the same one, in bytes.

    python -m benchmarks.train_memory '{"side": "ours", "folder": ..., "dtype": ..., "rows": ...}'

Ours, the same function's `torch.func.grad_and_value`, and its `torch.autograd.grad`; the weights
and the batch, which are there before, are left out. Prints JSON, after an @.
"""

import json
import subprocess
import sys
from typing import Any

import torch

import funcmodels as fm
from benchmarks.allocated import peak_of
from benchmarks.table import Row
from benchmarks.train_task import LENGTH, Task

OURS = "fm.grad_and_value"


def peaks(task: Task) -> dict[str, int]:
    model = fm.load_model(task.folder)
    weights = fm.load(model, task.folder, dtype=getattr(torch, task.dtype))
    batch = fm.pack(task.documents, LENGTH)

    def loss(weights: Any) -> torch.Tensor:
        return fm.loss(model, weights, batch)

    leaves = fm.tree.map(lambda w: w.detach().requires_grad_(), weights)
    calls = {
        OURS: lambda: fm.grad_and_value(loss)(weights),
        "torch.autograd.grad": lambda: torch.autograd.grad(loss(leaves), fm.tree.leaves(leaves)),
        "torch.func.grad_and_value": lambda: torch.func.grad_and_value(loss)(weights),
    }
    calls[OURS]()  # tables that are made once
    return {name: peak_of(call) for name, call in calls.items()}


def rows(task: Task) -> list[Row]:
    """Ours against each of the others, of a process that ends: less is better."""
    command = [sys.executable, "-m", "benchmarks.train_memory", task.text()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("@")]
    found = {name: size / 1e9 for name, size in json.loads(line[1:]).items()}
    ours = found.pop(OURS)
    what = f"{task.dtype} gradient alone, memory"
    return [Row(what, ours, peer, name, peer / ours, "GB") for name, peer in found.items()]


if __name__ == "__main__":
    print(f"@{json.dumps(peaks(Task(**json.loads(sys.argv[1]))))}")
