"""Time on a GPU: in turns, from events of the device; on a machine without one, of its clock."""

import random
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = torch.bfloat16
_START = time.perf_counter()
# Of torch.compile. Without a GPU only the script is tested, and compiling C++ takes minutes.
BACKEND = "inductor" if DEVICE.type == "cuda" else "aot_eager"


def machine() -> str:
    """The device and what runs on it."""
    if DEVICE.type == "cpu":
        return f"CPU, torch {torch.__version__}"
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}"
    )


def progress(what: str) -> None:
    """Say what is done, and after how long."""
    print(f"[{time.perf_counter() - _START:.0f} s] {what}", file=sys.stderr, flush=True)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(fn: Callable[[], object], calls: int) -> float:
    """Of one call, as the mean over `calls` that follow each other."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        return (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        fn()
    last.record()
    wait()
    return first.elapsed_time(last) / 1e3 / calls


def turns(
    sides: Mapping[str, Callable[[], object]], count: int, *, at_least: float = 0.02
) -> dict[str, list[float]]:
    """Seconds of a call of each side, `count` times, in an order drawn anew for each turn.

    A chip at its limit of power is slower after a side that took more of it, so that a fixed order
    would favour one side. All are warmed up first.

    Args:
        sides: name -> function.
        count: turns of each.
        at_least: seconds that a turn should last, which sets how many calls it makes.
    """
    calls = {}
    for name, fn in sides.items():
        fn()
        calls[name] = max(1, round(at_least / seconds(fn, 1)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    draw = random.Random(0)
    for _ in range(count):
        for name in draw.sample(list(sides), len(sides)):
            found[name].append(seconds(sides[name], calls[name]))
    return found


def graphed(fn: Callable[[], object]) -> Callable[[], object]:
    """fn as a CUDA graph, so that what is timed is the device's work and not Python's.

    It is called three times before, on the stream of the capture, as capturing asks for.
    """
    if DEVICE.type == "cpu":
        return fn
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = fn()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def matrix_rate(size: int) -> float:
    """FLOP/s of a bfloat16 product of two square matrices of random numbers."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=BF16) for _ in range(2))
    times = turns({"matmul": lambda: a @ b}, 7)["matmul"]
    return 2 * size**3 / median(times)
