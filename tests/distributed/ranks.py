"""Several processes of a test, over gloo, each running one function.

They are forked from a process that has imported what they need, and computed nothing: a rank starts
in a moment, and knows nothing of the tests before it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Imports of seconds; the first to start a process decides, for all tests of a run.
PRELOAD = [
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.fx.experimental.symbolic_shapes",
    "compiler.torch_target",
    "funcmodels.nn",
    "funcmodels.train",
]


def forkserver() -> Any:
    """The context of `multiprocessing` whose processes have their imports done."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def on_ranks(n: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`fn(*args)` in each of n processes; what each returned, by rank."""
    forkserver()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (n, folder, fn, args), nprocs=n, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(n)]


def _process(rank: int, n: int, folder: str, fn: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=n
    )
    try:
        torch.save(fn(*args), f"{folder}/{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # threads of a group in some cycle, gone before the interpreter is


def mesh_of(**sizes: int) -> DeviceMesh:
    """A mesh of the CPU with dims of these names and sizes."""
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
