"""What cross-entropy over a cut vocabulary means, on all ranks at once: three numbers a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiler import collectives
from compiler.comm import Comm
from funcmodels.ops.loss_function import TokenStats
from funcmodels.ops.loss_logits import Logits, Stats, Weights, losses


def cross_entropy(comm: Comm, calls: list[tuple[tuple, dict]]) -> list[Tensor]:
    """`rules.cross_entropy_over_ranks` on each rank."""
    hiddens = comm.run(collectives.vary, [args[0] for args, _ in calls], ())
    own = [
        _own_stats(rank, hidden, args[1], args[2], **kwargs)
        for rank, hidden, (args, kwargs) in zip(comm.ranks, hiddens, calls, strict=True)
    ]
    every = comm.run(collectives.all_gather, own, (0, comm.size))
    return [
        _loss(found, args[2], **kwargs) for found, (args, kwargs) in zip(every, calls, strict=True)
    ]


def _own_stats(
    rank: int,
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    **_: Any,
) -> Tensor:
    """(1, 3, n): lse, the target's logit or 0, the mean, over a rank's rows of the table."""
    rows = table.shape[0]
    place = targets.reshape(-1) - rank * rows
    here = (place >= 0) & (place < rows)
    o = Logits(chunk, float(scale), softcap, label_smoothing != 0)
    flat, place = hidden.reshape(-1, hidden.shape[-1]), torch.where(here, place, 0).long()
    s = Stats(*TokenStats.apply(flat, table.to(hidden.dtype), place, *o))
    return torch.stack([s.lse, torch.where(here, s.target, 0), s.mean])[None]


def _loss(
    every: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **_: Any,
) -> Tensor:
    """Of all ranks' numbers (ranks, 3, n), each token's loss."""
    lse, target, mean = every.unbind(1)
    s = Stats(lse.logsumexp(0), target.sum(0), mean.mean(0))
    each = losses(s, Weights(label_smoothing, z_loss)).reshape(targets.shape)
    return each if mask is None else torch.where(mask != 0, each * mask.to(each.dtype), 0)
