"""Collectives between processes, apart from any model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from compiler import comm
from tests.distributed.ranks import DEVICE, on_ranks


def waited_for() -> list[list[float]]:
    """What was waited for as each of three gathers started, by the first value of each."""
    over = comm.over(dist.group.WORLD)
    waits: list[float] = []
    wait = comm.wait

    def noted(x: torch.Tensor) -> torch.Tensor:
        x = wait(x)
        waits.append(x[0].item())
        return x

    comm.wait = noted
    try:
        started, found = [], []
        for value in (1.0, 2.0, 3.0):
            started.append(over.start_gather(torch.full((4,), value)))
            found.append(waits[:])
        noted(started[-1])
        return [*found, [x.sum().item() for x in started]]
    finally:
        comm.wait = wait


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="NCCL keeps its own order")
def test_one_collective_at_a_time_over_gloo():
    """Two at once broke the heap of one process in fifty."""
    for rank in on_ranks(2, waited_for):
        assert rank == [[], [1.0], [1.0, 2.0], [8.0, 16.0, 24.0]]
