"""What share of a step's time NCCL's kernels take, and in how much of it nothing else runs."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def nccl_shares(step: Callable[[], Any], steps: int) -> dict[str, float]:
    """Of some steps' time on this process's GPU, by the profiler.

    A kernel of NCCL lasts from when it is there to when the other ranks have sent their parts: so
    the time includes that of waiting for a slower rank.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return shares([event for event in events if event.get("cat") in ON_DEVICE])


def shares(events: list[dict[str, Any]]) -> dict[str, float]:
    """Of what ran on a device, in the profiler's form: each with name, ts and dur."""
    sent, other = [], []
    for event in events:
        at = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        (sent if event["name"].startswith("nccl") else other).append(at)
    whole = max(end for _, end in sent + other) - min(start for start, _ in sent + other)
    busy, computing = length(sent + other), length(other)
    return {
        "share of time in NCCL": length(sent) / whole,
        "share in NCCL alone": (busy - computing) / whole,
        "share with nothing on the GPU": 1 - busy / whole,
    }


def length(intervals: list[Interval]) -> float:
    """How long at least one of them lasts."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
