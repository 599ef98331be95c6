"""Memory in bytes: what torch's allocator gave out, and took back, while something ran."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_of(call: Callable[[], Any]) -> int:
    """The most bytes of the CPU that were allocated at once in `call`, beside those before it.

    Exact, unlike resident memory: no pages that the allocator keeps, and nothing but tensors.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    del result  # only now: it was held to the end
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
