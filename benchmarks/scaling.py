"""Weak scaling of training over processes, and the share of time that they wait for each other.

    python -m benchmarks.scaling [--quick] [--rows N] [--rounds N] [--mesh NAME ...] [--json FILE]
    python -m benchmarks.scaling --device cuda [--compiled] ...

A step is forward, backward and AdamW. One process works on N rows, n of them on n times as many:
along dp and fsdp each has its own, along tp all work on the same ones. The efficiency is the tokens
per second of n processes against n times those of one. Memory is the peak of the first process:
what it grows to from before the model on a CPU, what is allocated on a GPU.

On a CPU: the training benchmark's shape with 8 heads in place of 9, which two ranks divide, in
float32, on rows of 512 tokens, over gloo. Each process has one thread. On GPUs: Llama-3.2-1B's, in
bfloat16, on rows of 4096, over NCCL, a GPU a process. Meshes of more processes than there are cores
or GPUs are left out.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.multiprocessing as mp
import typer

from benchmarks import gpu_train, train_task
from benchmarks.gpu_time import progress
from benchmarks.scaling_process import Mesh, Task, train
from benchmarks.table import Row, report

MESHES: dict[str, Mesh] = {
    "dp2": Mesh({"dp": 2}),
    "fsdp2": Mesh({"fsdp": 2}),
    "tp2": Mesh({"tp": 2}),
    "tp2, sequence parallel": Mesh({"tp": 2}, sequence_parallel=True),
    "fsdp2 x tp2": Mesh({"fsdp": 2, "tp": 2}),
}


def task_of(device: str, layers: int | None, rows: int, rounds: int, compiled: bool) -> Task:
    """What is trained on a device."""
    if device == "cuda":
        hf, dtype, length = gpu_train.HF, torch.bfloat16, 4096
    else:
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
        hf, dtype, length = {**train_task.HF, **heads}, torch.float32, train_task.LENGTH
    if layers is not None:
        hf = {**hf, "num_hidden_layers": layers}
    return Task(device, hf, dtype, rows, length, rounds, compiled)


def measured(task: Task, mesh: Mesh) -> dict[str, float]:
    """What the first process of a mesh has measured."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(train, (task, mesh, folder), nprocs=mesh.processes, start_method="spawn")
        return torch.load(Path(folder) / "found.pt")


def rows_of(name: str, n: int, found: dict[str, float], alone: dict[str, float]) -> list[Row]:
    """Speed and memory of n processes against those of one."""
    speed, whole = found["speed"], n * alone["speed"]
    shares = {key: value for key, value in found.items() if key.startswith("share")}
    peak, ratio = found["peak"], alone["peak"] / found["peak"]
    return [
        Row(f"{name}, loss {found['loss']:.4f}", speed, whole, f"{n} x one process",
            speed / whole, "tokens/s", shares),
        Row(f"{name}, peak of a process", peak, alone["peak"], "one process", ratio, "MB"),
    ]  # fmt: skip


def run(
    *,
    device: str = "cpu",
    layers: int | None = None,
    rows: int,
    rounds: int,
    compiled: bool = False,
    meshes: list[str] | None = None,
    json: Path | None = None,
) -> list[Row]:
    """Measure, and print a table."""
    there = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    task = task_of(device, layers, rows, rounds, compiled)
    alone = measured(task, Mesh({}))
    progress(f"one process: {alone['speed']:,.0f} tokens/s")
    found: list[Row] = []
    for name in meshes or MESHES:
        n = MESHES[name].processes
        if n > there:
            progress(f"{name} is left out: {n} processes, {there} {device} devices or cores")
            continue
        found += rows_of(name, n, measured(task, MESHES[name]), alone)
        progress(f"{name} measured")
    kind = f"{there} GPUs" if device == "cuda" else f"{there} cores"
    what = f"{task.hf['num_hidden_layers']} layers, {rows} rows of {task.length} a process"
    report(f"Weak scaling, {what}, {kind}{', compiled' if compiled else ''}", found, json)
    return found


def main(
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cpu",
    quick: Annotated[bool, typer.Option(help="fewer layers")] = False,
    compiled: Annotated[bool, typer.Option(help="the loss under torch.compile; cuda only")] = False,
    mesh: Annotated[list[str] | None, typer.Option(help="of these alone")] = None,
    rows: Annotated[int, typer.Option(help="of a process")] = 2,
    rounds: Annotated[int, typer.Option(help="timed steps")] = 5,
    json: Annotated[Path | None, typer.Option(help="where to write the rows")] = None,
) -> None:
    """Weak scaling of training over processes."""
    unknown = [name for name in mesh or () if name not in MESHES]
    if unknown:
        raise typer.BadParameter(f"no mesh {unknown[0]!r}; there are {', '.join(MESHES)}")
    if compiled and device == "cpu":
        raise typer.BadParameter("--compiled is of --device cuda: what is timed here is in Python")
    run(
        device=device,
        layers=train_task.QUICK_LAYERS if quick else None,
        rows=rows,
        rounds=rounds,
        compiled=compiled,
        meshes=mesh,
        json=json,
    )


if __name__ == "__main__":
    typer.run(main)
