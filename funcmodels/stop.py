"""A graceful stop: the first signal is remembered, the second does what it always did."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a signal came, in any process of the job."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None

    def agreed(self) -> bool:
        """True in every process after the same step; a collective in a job of several."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.asked is not None
        device = "cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_device_index()
        flag = torch.tensor(float(self.asked is not None), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


@contextlib.contextmanager
def on_signals() -> Iterator[Stop]:
    """Catch SIGINT and SIGTERM once. Outside the main thread, where Python cannot, none."""
    stop, before = Stop(), {}
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def remember(number: int, frame: FrameType | None) -> None:
        stop.asked = signal.Signals(number)
        restore()  # who presses twice does not want to wait

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    for each in SIGNALS:
        before[each] = signal.getsignal(each) or signal.SIG_DFL
        signal.signal(each, remember)
    try:
        yield stop
    finally:
        restore()
