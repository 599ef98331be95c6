"""Processes that train one model start with the same weights, and share batches where they must."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from funcmodels import tree
from funcmodels.errors import TrainingError, listed

if TYPE_CHECKING:
    from compiler.torch_target import CompiledModel

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def agree_alone(weights: Any, batch: Any) -> None:
    """Refuse processes of which each trains a model of its own; all of them call this.

    Raises:
        TrainingError: their weights or their first batches differ.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    size = dist.get_world_size()
    for name, value in (("weights", weights), ("batches", batch)):
        paths, rank = _differing([((), marks) for marks in _of_all(_marks(value))])
        if paths:
            raise TrainingError(
                "each process trains a model of its own",
                got=f"{size} processes with other {name}: on rank {rank}, {listed(paths)}",
                need="one model over all processes, or the same weights and batches on each",
                fix=f'mesh = init_device_mesh(device, ({size},), mesh_dim_names=("dp",)); '
                "module = fm.compile_to_torch(model, mesh).load(weights); "
                "fm.fit(module, module.weights(), ...)",
            )


def agree_on_mesh(module: CompiledModel, weights: Any, batch: Any) -> None:
    """Refuse parts of one model that do not belong together; all processes call this.

    Raises:
        TrainingError: what several processes hold alike, or the batch of tp ranks, differs.
    """
    if module.ranks is None or not dist.is_initialized():
        return
    places = {path: tuple(place.offset) for path, place in module.placements().items()}
    held = {(path, places[path]): mark for path, mark in _marks(weights).items()}
    paths, rank = _differing([((), marks) for marks in _of_all(held)])
    if paths:
        raise TrainingError(
            "processes that hold the same parameters have other values of them",
            got=f"rank {rank}, of {listed([path for path, _ in paths])}",
            need="one model: each process starts with its part of the same weights",
            fix="module.reset(seed=0) with one seed, or module.load(weights) of the same weights",
        )
    shares = tuple(comm.rank for comm in module.ranks.of_data)
    paths, rank = _differing(_of_all((shares, _marks(batch))))
    if paths:
        raise TrainingError(
            'ranks along "tp" have other batches',
            got=f"rank {rank}, in {listed(paths)}",
            need='one batch for the ranks along "tp": they share the layers that it goes through',
            fix='data by the places along "dp" and "fsdp" alone, as mesh.get_local_rank("dp")',
        )


def _differing(every: list[tuple[Any, dict[Any, Any]]]) -> tuple[list[Any], int]:
    """What a rank has otherwise than one before it of the same kind, and the first such rank."""
    known: dict[Any, Any] = {}
    for rank, (kind, marks) in enumerate(every):
        found = [key for key, mark in marks.items() if known.setdefault((kind, key), mark) != mark]
        if found:
            return found, rank
    return [], 0


def _marks(value: Any) -> dict[str, Any]:
    """Of each tensor, what those of other values have otherwise: the same on every process.

    Sums of integers: however many threads add them up, and in whatever order, they are the same.
    """
    return {
        path: (tuple(leaf.shape), str(leaf.dtype), _sum_of_bits(leaf))
        for path, leaf in tree.items(value)
        if isinstance(leaf, Tensor)
    }


@torch.no_grad()
def _sum_of_bits(x: Tensor) -> int:
    """The sum of what the elements are in memory, and of that of each row times its number."""
    if not x.numel():
        return 0
    x = torch.view_as_real(x) if x.is_complex() else x
    bits = x.contiguous().view(_BITS[x.element_size()])
    rows = bits.reshape(len(bits) if bits.dim() else 1, -1).sum(1, dtype=torch.int64)
    return int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())


def _of_all(value: Any) -> list[Any]:
    """What each process has of this, by rank."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every
