"""Several processes of a test, each running one function: over gloo, or on GPUs over NCCL.

They are forked from a process that has imported what they need, and computed nothing: a rank starts
in a moment, and knows nothing of the tests before it. With FUNCMODELS_TEST_DEVICE=cuda each has a
GPU of its own and is started anew; what they are compared with, `on_one`, runs on a GPU as well.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import funcmodels as fm

DEVICE = os.environ.get("FUNCMODELS_TEST_DEVICE", "cpu")  # of cuda, each rank's current one

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
    """`fn(*args)` in each of n processes; what each returned, by rank, on the CPU."""
    if DEVICE == "cuda" and torch.cuda.device_count() < n:
        pytest.skip(f"{n} ranks need a GPU each, and there are {torch.cuda.device_count()}")
    method = "spawn" if DEVICE == "cuda" else "forkserver"  # CUDA does not survive a fork
    forkserver()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (n, folder, fn, args), nprocs=n, start_method=method)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(n)]


def on_one(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)` in this process, computed as ranks compute: what they are compared with."""
    with _exact():
        return _on_cpu(fn(*args))


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """On a GPU, float32 by kernels that round no products: its sums differ in order alone.

    And the attention that compiles nothing, which each rank would do for itself.
    """
    if DEVICE == "cpu":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with fm.attention_kernel("reference"):
        yield


def _on_cpu(found: Any) -> Any:
    """The same dicts, lists and tuples, with their tensors on the CPU."""
    if isinstance(found, torch.Tensor):
        return found.detach().cpu()
    if isinstance(found, dict):
        return {key: _on_cpu(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return type(found)(map(_on_cpu, found))
    return found


def _process(rank: int, n: int, folder: str, fn: Callable[..., Any], args: tuple) -> None:
    gc.freeze()  # what was imported is no garbage: to look took each rank half its time
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=n
    )
    try:
        torch.save(on_one(fn, *args), f"{folder}/{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # threads of a group in some cycle, gone before the interpreter is


def mesh_of(**sizes: int) -> DeviceMesh:
    """A mesh with dims of these names and sizes."""
    return init_device_mesh(DEVICE, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
