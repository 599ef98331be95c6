"""How long an engine takes to start on the emitted class, and its memory, against vLLM's own class.

    python -m benchmarks.start [--model NAME ...] [--compiled] [--quick] [--json FILE]

Each start is a process of its own, and the sides take turns. "start" is `LLM(...)` after imports,
compiling and registering the model included; "load" is the time in vLLM's loader; "memory" is the
most that was resident. The models are those of `benchmarks.shapes`: SmolLM2-135M-Instruct unless
others are named. bfloat16, tensor parallel 1; eager, or compiled by torch with what the start
before left in vLLM's cache: the first start of a side is thrown away.
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
from benchmarks.shapes import SHAPES, Shape
from benchmarks.sides import OURS, register_ours
from benchmarks.table import Row, compare, report

# Of each figure, its unit; all are better when less, so rows hold their inverse.
UNITS = {"start": "1/s", "load": "1/s", "memory": "1/GiB"}


def main(
    model: Annotated[list[str] | None, typer.Option(help="may be repeated")] = None,
    compiled: Annotated[bool, typer.Option(help="by torch.compile")] = False,
    quick: Annotated[bool, typer.Option(help="fewer starts, with more noise")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows here")] = None,
) -> None:
    """Start engines in turn, print a table, and write the rows where --json says."""
    names = model or ["smollm2"]
    if unknown := set(names) - set(SHAPES):
        raise typer.BadParameter(f"--model {min(unknown)}: need one of {', '.join(SHAPES)}")
    rows = [
        row
        for name in names
        for row in _rows(name, SHAPES[name], compiled, turns=4 if quick else 10)
    ]
    report(f"Starting an engine, bfloat16, {'compiled' if compiled else 'eager'}", rows, json_file)


def _rows(name: str, shape: Shape, compiled: bool, *, turns: int) -> list[Row]:
    """The figures of one model, each against vLLM's own class for it."""
    folder, sides = shape.folder(), (OURS, shape.peer)
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for turn in track(range(turns), f"{name}: starting", console=Console(stderr=True)):
        for side in reversed(sides) if turn % 2 else sides:
            found = _start(side, folder, compiled)
            if turn > 0:  # the first fills vLLM's caches
                figures[side].append(found)
    rows = []
    for what, unit in UNITS.items():
        ours, peer = ([1 / one[what] for one in figures[side]] for side in sides)
        rows.append(compare(f"{name} {what}", ours, {shape.peer: peer}, unit))
    return rows


def _start(side: str, folder: Path, compiled: bool) -> dict[str, float]:
    """The figures of one start."""
    how = "compiled" if compiled else "eager"
    command = [sys.executable, "-m", "benchmarks.start", "--child", side, str(folder), how]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _child(side: str, folder: Path, compiled: bool) -> None:
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
    # As many tokens as in benchmarks.serve: compiled, the engine warms up with a step of them.
    batched = {"max_num_batched_tokens": 2048}
    start_engine(folder, hf_overrides=overrides, enforce_eager=not compiled, **batched)
    figures = {"start": time.perf_counter() - start, "load": seconds[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    print("\n" + json.dumps({**figures, "memory": peak / 2**20}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "compiled")
    else:
        typer.run(main)
