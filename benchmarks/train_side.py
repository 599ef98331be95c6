"""A side of the training benchmark: a process that takes a step when it is told to.

    python -m benchmarks.train_side '{"side": ..., "folder": ..., "dtype": ..., "rows": ...}'

Each line read is a number of steps; each line written, after an @, is JSON with their seconds, the
last loss, and the largest resident memory while they ran.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.train_task import LENGTH, LR, Task, packed

Step = Callable[[], float]  # takes a step, and gives the loss before it


def ours(task: Task, *, compiled: bool) -> Step:
    """`fm.loss` of the pure function, `fm.grad_and_value`, and `fm.optim.adamw` in place."""
    import torch

    import funcmodels as fm

    model = fm.load_model(task.folder)
    weights = fm.load(model, task.folder, dtype=getattr(torch, task.dtype))
    batch = fm.pack(task.documents, LENGTH)

    def loss(weights: Any, batch: Any) -> Any:
        return fm.loss(model, weights, batch)

    gradients = fm.grad_and_value(torch.compile(loss) if compiled else loss)
    optimizer = fm.optim.adamw(LR)
    held = [weights, optimizer.init(weights)]
    del weights

    def step() -> float:
        grads, value = gradients(held[0], batch)
        held[0], held[1] = optimizer.update(grads, held[1], held[0], donate=True)
        return value.item()

    return step


def transformers(task: Task, *, compiled: bool) -> Step:
    """`LlamaForCausalLM` with SDPA and the loss that it takes itself, and torch's fused AdamW."""
    import torch
    from transformers import LlamaForCausalLM

    module = LlamaForCausalLM.from_pretrained(
        task.folder, dtype=getattr(torch, task.dtype), attn_implementation="sdpa"
    )
    module.train()
    batch = {name: torch.tensor(rows) for name, rows in packed(task).items()}
    ids = batch["ids"]
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    given = {
        "input_ids": batch["tokens"],
        "position_ids": batch["positions"],
        "attention_mask": (causal & (ids[:, :, None] == ids[:, None, :]))[:, None],
        "labels": batch["tokens"],
        "shift_labels": torch.where(batch["mask"] != 0, batch["tokens"].roll(-1, 1), -100),
    }
    called = torch.compile(module) if compiled else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)

    def step() -> float:
        loss = called(**given, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def step_of(task: Task) -> Step:
    """The step of a side, which the first call compiles."""
    if task.side == "jax":
        from benchmarks.train_jax import step_of

        return step_of(task)
    make = {"ours": ours, "transformers": transformers}
    name, _, mode = task.side.partition(" ")
    return make[name](task, compiled=mode == "compiled")


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    step = step_of(task)
    losses = [step()]  # compiles
    step()
    _answer({"loss": losses[0]})
    for line in sys.stdin:
        gc.collect()
        _forget_peak()
        clock = time.process_time if task.processor_time else time.perf_counter
        start = clock()
        losses = [step() for _ in range(int(line))]
        seconds = clock() - start
        _answer({"seconds": seconds, "loss": losses[-1], "peak": _peak()})


def _answer(values: dict[str, float]) -> None:
    print(f"@{json.dumps(values)}", flush=True)


def _forget_peak() -> None:
    """Let the kernel count the largest resident memory anew, without what compilers needed."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The largest resident memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
