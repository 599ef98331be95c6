"""What a benchmark computes from what it measures."""

import pytest

from benchmarks.scaling_nccl import length, shares


def event(name: str, ts: float, dur: float) -> dict:
    return {"name": name, "ts": ts, "dur": dur}


def test_length_counts_what_overlaps_once():
    assert length([]) == 0
    assert length([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_shares_of_nccl():
    """Ten units: NCCL from 2 to 6, of which products overlap 2 to 3; nothing from 6 to 8."""
    events = [
        event("gemm", 0, 3),
        event("ncclDevKernel_AllGather", 2, 3),
        event("ncclDevKernel_ReduceScatter", 4, 2),
        event("gemm", 8, 2),
    ]
    found = list(shares(events).values())
    assert found == pytest.approx([0.4, 0.3, 0.2])
