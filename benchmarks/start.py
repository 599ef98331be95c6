"""How long an engine takes to start on the emitted class, and its memory, against vLLM's own class.

    python -m benchmarks.start [--quick] [--json FILE]

Each start is a process of its own, and the sides take turns. "start" is `LLM(...)` after imports,
compiling and registering the model included; "load" is the time in vLLM's loader; "memory" is the
most that was resident. SmolLM2-135M-Instruct, bfloat16, eager, tensor parallel 1.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.engine import start as start_engine
from benchmarks.sides import OURS, register_ours
from benchmarks.table import compare, report
from examples.smollm2 import convert

LLAMA = "vLLM Llama"
# Of each figure, its unit; all are better when less, so rows hold their inverse.
UNITS = {"start": "1/s", "load": "1/s", "memory": "1/GiB"}


def main(
    quick: Annotated[bool, typer.Option(help="fewer starts, with more noise")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows here")] = None,
) -> None:
    """Start engines in turn, print a table, and write the rows where --json says."""
    folder = convert()
    figures: dict[str, list[dict[str, float]]] = {OURS: [], LLAMA: []}
    for turn in track(range(4 if quick else 10), "starting", console=Console(stderr=True)):
        for side in sorted(figures, reverse=bool(turn % 2)):
            found = _start(side, folder)
            if turn > 0:  # the first fills vLLM's caches
                figures[side].append(found)
    rows = []
    for what, unit in UNITS.items():
        ours, llama = ([1 / one[what] for one in figures[side]] for side in (OURS, LLAMA))
        rows.append(compare(what, ours, {LLAMA: llama}, unit))
    report("Starting an engine on SmolLM2-135M, bfloat16, eager", rows, json_file)


def _start(side: str, folder: Path) -> dict[str, float]:
    """The figures of one start."""
    command = [sys.executable, "-m", "benchmarks.start", "--child", side, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _child(side: str, folder: Path) -> None:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1"
    )
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    import funcmodels  # noqa: F401  (imports are not what is measured, on either side)

    load = BaseModelLoader.load_model
    seconds = []

    def timed(self, *args, **kwargs):
        start = time.perf_counter()
        model = load(self, *args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return model

    BaseModelLoader.load_model = timed
    start = time.perf_counter()
    overrides = {"architectures": [register_ours(folder)]} if side == OURS else {}
    start_engine(folder, hf_overrides=overrides)
    figures = {"start": time.perf_counter() - start, "load": seconds[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    print("\n" + json.dumps({**figures, "memory": peak / 2**20}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], Path(sys.argv[3]))
    else:
        typer.run(main)
