"""Weak scaling of training over processes, and the share of time that they wait for each other.

    python -m benchmarks.scaling [--quick] [--rows N] [--rounds N] [--json FILE]

The training benchmark's shape with 8 heads in place of 9, which two ranks divide, in float32; a
step is forward, backward and AdamW on rows of 512 tokens. One process works on N rows, two on 2N:
along dp and fsdp each has N of its own, along tp both work on all of them. The efficiency is the
tokens per second of two processes against twice those of one. Each process has one thread; on a
machine with fewer free cores than processes the figures mean nothing.
"""

import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import typer
from torch.distributed.device_mesh import init_device_mesh

import funcmodels as fm
from benchmarks.table import Row, report
from benchmarks.train_task import HF, LENGTH, QUICK_LAYERS
from compiler import comm
from funcmodels.models import llama

MESHES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "one process": (None, {}),
    "dp2": ("dp", {}),
    "fsdp2": ("fsdp", {}),
    "tp2": ("tp", {}),
    "tp2, sequence parallel": ("tp", {"sequence_parallel": True}),
}


def weak_scaling(*, layers: int, rows: int, rounds: int) -> list[Row]:
    """A row for each mesh of two processes: tokens per second against twice one process's."""
    found = {}
    for name, (dim, options) in MESHES.items():
        n = 1 if dim is None else 2
        with tempfile.TemporaryDirectory() as folder:
            args = (n, folder, dim, options, layers, rows, rounds)
            mp.start_processes(_process, args, nprocs=n, start_method="spawn")
            found[name] = torch.load(Path(folder) / "found.pt")
    alone = found.pop("one process")
    return [
        Row(
            f"{name}, {value['loss']:.4f}",
            value["speed"],
            2 * alone["speed"],
            "twice one process",
            value["speed"] / (2 * alone["speed"]),
            "tokens/s",
            {"share of time in collectives": value["share"], "peak MB": value["peak"]}
            | {"one process's peak MB": alone["peak"]},
        )
        for name, value in found.items()
    ]


def _process(
    rank: int,
    n: int,
    folder: str,
    dim: str | None,
    options: dict[str, Any],
    layers: int,
    rows: int,
    rounds: int,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=n)
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = llama.model(llama.Config.from_hf({**HF, **sizes}))
    mesh = None if dim is None else init_device_mesh("cpu", (n,), mesh_dim_names=(dim,))
    module = fm.compile_to_torch(model, mesh, **options).reset(seed=0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, HF["vocab_size"], (n * rows, LENGTH), generator=drawn)
    if dim in ("dp", "fsdp"):
        tokens = tokens.chunk(n)[rank]
    waited = _Waited()
    times, shares, loss = [], [], torch.zeros(())
    for _ in range(rounds + 1):
        waited.seconds, start = 0.0, time.perf_counter()
        logits = module(tokens)[:, :-1].flatten(0, 1)
        loss = module.mean(F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        shares.append(waited.seconds / times[-1])
    if rank == 0:
        value = {
            "speed": n * rows * LENGTH / median(times[1:]),
            "share": median(shares[1:]),
            "peak": _peak(),
            "loss": loss.item(),
        }
        torch.save(value, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


class _Waited:
    """The time that this process spends in starting collectives and in waiting for them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.ops, comm._c10d = comm._c10d, self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        op = getattr(self.ops, name)

        def timed(*args: Any, **given: Any) -> Any:
            start = time.perf_counter()
            out = op(*args, **given)
            self.seconds += time.perf_counter() - start
            return out

        return timed


def _peak() -> float:
    """The largest resident memory of this process so far, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def run(*, layers: int, rows: int, rounds: int, json: Path | None = None) -> list[Row]:
    """Measure, and print a table."""
    cores = len(os.sched_getaffinity(0))
    found = weak_scaling(layers=layers, rows=rows, rounds=rounds)
    title = f"Weak scaling, {layers} layers, {rows} rows of {LENGTH} a process, {cores} cores"
    report(title, found, json)
    return found


def main(
    quick: Annotated[bool, typer.Option(help="fewer layers")] = False,
    rows: int = 2,
    rounds: int = 5,
    json: Annotated[Path | None, typer.Option(help="where to write the rows")] = None,
) -> None:
    """Weak scaling of training on two processes."""
    layers = QUICK_LAYERS if quick else HF["num_hidden_layers"]
    run(layers=layers, rows=rows, rounds=rounds, json=json)


if __name__ == "__main__":
    typer.run(main)
