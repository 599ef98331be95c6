"""Over the ranks that have batches of their own: sums of gradients, and means of losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # type: ignore[attr-defined]

from compiler.comm import Processes

BUCKET_BYTES = 25 << 20  # as DistributedDataParallel's: large enough for the network to fill


def summed_late(comm: Processes, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, whose gradients are summed over ranks, a bucket at a time.

    A bucket's sum starts when all its gradients are there, and is waited for after all others have
    started.
    """
    moving = {path: x for path, x in weights.items() if differentiated(x)}
    if not moving or not torch.is_grad_enabled():
        return weights
    moving = landed(comm, moving)
    found = dict(weights)
    for bucket in _buckets(moving):
        values = comm.call("vary_late", [moving[path] for path in bucket])
        found.update(zip(bucket, values, strict=True))
    return found


def landed(comm: Processes, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, whose gradients may still be on their way: here they are waited for."""
    moving = {path: x for path, x in weights.items() if differentiated(x)}
    if not moving:
        return weights
    values = comm.call("landed", list(moving.values()))
    return {**weights, **dict(zip(moving, values, strict=True))}


def differentiated(x: Tensor) -> bool:
    """Whether a gradient by x may be asked for: inside a transform that cannot be told."""
    transformed = functorch.peek_interpreter_stack() is not None
    return x.is_floating_point() and (x.requires_grad or transformed)


def _buckets(weights: dict[str, Tensor]) -> list[list[str]]:
    """Paths in rows of one dtype, each of about BUCKET_BYTES, in the tree's order."""
    buckets: list[list[str]] = []
    open_: dict[torch.dtype, tuple[list[str], int]] = {}
    for path, x in weights.items():
        bucket, size = open_.get(x.dtype, ([], 0))
        if not bucket:
            buckets.append(bucket)
        bucket.append(path)
        size += x.numel() * x.element_size()
        open_[x.dtype] = ([], 0) if size >= BUCKET_BYTES else (bucket, size)
    return buckets


def global_mean(comms: list[Processes], values: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted mean over all ranks; its gradient by each rank's values is that of the whole.

    0 where nothing has a weight, as of `fm.loss`.
    """
    if weights is None:
        weights = torch.ones_like(values)
    # float32: a count of tokens in bfloat16 is exact up to 256 only.
    wide = torch.promote_types(values.dtype, torch.float32)
    weights = weights.to(wide)
    total, count = (values.to(wide) * weights).sum(), weights.sum()
    for comm in comms:
        (total,) = comm.call("all_reduce", [total])
        (count,) = comm.call("all_reduce", [count])
    return total / torch.where(count == 0, 1, count)
