"""One process of the scaling benchmark: steps on its part of a mesh, their time and memory."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import funcmodels as fm
from benchmarks.scaling_nccl import nccl_shares
from compiler import comm
from funcmodels.models import llama

WARM_UP = 2  # steps: the first makes the optimiser's state, the second reuses its memory


@dataclass(frozen=True)
class Mesh:
    """The dims of a mesh, none for one process."""

    dims: dict[str, int]
    sequence_parallel: bool = False

    @property
    def processes(self) -> int:
        return prod(self.dims.values())


@dataclass(frozen=True)
class Task:
    """What is trained, on which device: `rows` of `length` tokens for each process there is."""

    device: str
    hf: dict[str, Any] = field(repr=False)
    dtype: torch.dtype
    rows: int
    length: int
    rounds: int
    compiled: bool


def train(rank: int, task: Task, mesh: Mesh, folder: str) -> None:
    """Run, and leave what the first process has measured in a file of the folder."""
    n, on_gpu = mesh.processes, task.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=rank, world_size=n)
    try:
        found = measure(task, mesh)
        if rank == 0:
            torch.save(found, Path(folder) / "found.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def measure(task: Task, mesh: Mesh) -> dict[str, float]:
    """Tokens per second of all processes, the shares of collectives, the peak in MB, the loss."""
    memory = _Allocated() if task.device == "cuda" else _Resident()
    step = step_of(task, mesh)
    waited = None if task.device == "cuda" else _Waited()
    times, shares, loss = [], [], torch.zeros(())
    for _ in range(WARM_UP + task.rounds):
        _settle(task)
        start, before = time.perf_counter(), waited.seconds if waited else 0.0
        loss = step()
        _settle(task)
        times.append(time.perf_counter() - start)
        if waited:
            shares.append((waited.seconds - before) / times[-1])
    peak = memory.peak()
    found = {
        "speed": mesh.processes * task.rows * task.length / median(times[WARM_UP:]),
        "peak": peak,
        "loss": loss.item(),
    }
    if waited:
        return {**found, "share of time in collectives": median(shares[WARM_UP:])}
    return {**found, **nccl_shares(step, steps=min(3, task.rounds))}


def step_of(task: Task, mesh: Mesh) -> Callable[[], Tensor]:
    """A step of this process: forward, backward and AdamW on its rows."""
    model = llama.model(llama.Config.from_hf(task.hf))
    names, sizes = tuple(mesh.dims), tuple(mesh.dims.values())
    made = init_device_mesh(task.device, sizes, mesh_dim_names=names) if names else None
    module = fm.compile_to_torch(model, made, sequence_parallel=mesh.sequence_parallel)
    module.reset(seed=0, dtype=task.dtype, device=task.device)
    weights = module.weights()
    fused = True if task.device == "cuda" else None
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=fused)
    batch = {"tokens": own_rows(task, mesh, module).to(task.device)}

    def loss_of(weights: Any) -> Tensor:
        return module.loss(weights, batch)

    if task.compiled:
        loss_of = torch.compile(loss_of)

    def step() -> Tensor:
        loss = loss_of(weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def own_rows(task: Task, mesh: Mesh, module: fm.CompiledModel) -> Tensor:
    """The rows of this process: those along tp have the same."""
    drawn = torch.Generator().manual_seed(0)
    shape = (mesh.processes * task.rows, task.length)
    tokens = torch.randint(0, task.hf["vocab_size"], shape, generator=drawn)
    for data in [] if module.ranks is None else module.ranks.of_data:
        tokens = tokens.chunk(data.size)[data.rank]
    return tokens


def _settle(task: Task) -> None:
    """Nothing of the step before is under way on the device."""
    if task.device == "cuda":
        torch.cuda.synchronize()


class _Waited:
    """The time that this process spends in starting collectives and in waiting for them.

    On a CPU, where it does nothing else meanwhile.
    """

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


class _Resident:
    """By how many MB the resident memory of this process grows at most."""

    def __init__(self) -> None:
        self.before = self._of("VmRSS")

    def peak(self) -> float:
        return self._of("VmHWM") - self.before

    def _of(self, name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


class _Allocated:
    """How many MB of its GPU this process has allocated at most."""

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20
