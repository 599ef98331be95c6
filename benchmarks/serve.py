"""Serving speed of the emitted class against vLLM's own class and its transformers backend.

    python -m benchmarks.serve [--model NAME ...] [--tp N ...] [--mode eager|compiled|both]
                               [--load NAME ...] [--starts N] [--quick] [--processor-time]
                               [--json FILE]

bfloat16, with vLLM's settings the same on all sides. The models are those of `benchmarks.shapes`:
SmolLM2-135M-Instruct unless others are named. Each side is a process of its own that holds its
engine; the sides take turns, A B C, C B A, ..., so that whatever else the machine does, and its
clock, hits all alike. The first turn is thrown away. A figure is the median over the turns, and a
ratio the median of the turns' ratios. A process keeps what it drew when it started, such as where
its memory lies: with --starts, all sides are started so many times, and turns counted over all.
"""

import os
import tempfile
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from benchmarks.shapes import SHAPES, Shape
from benchmarks.sides import OURS, TRANSFORMERS, Load, Settings, Side
from benchmarks.table import Row, compare, report, spread

UNIT = "tokens/s"
LOADS = [
    Load("prefill 8x256", batch=8, prompt=256, new=1),
    Load("decode 8x64", batch=8, prompt=8, new=64),
    Load("decode 1x64", batch=1, prompt=8, new=64),
]


class Mode(StrEnum):
    eager = "eager"
    compiled = "compiled"
    both = "both"


Figures = dict[str, dict[str, list[float]]]  # load -> side -> one figure a turn


def measure(
    names: list[str], settings: Settings, loads: list[Load], *, what: str, rounds: int
) -> Figures:
    """Let the sides take turns over the loads."""
    figures: Figures = {load.what: {name: [] for name in names} for load in loads}
    sides: list[Side] = []
    columns = [SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn()]
    with tempfile.TemporaryDirectory() as logs, Progress(*columns, transient=True) as progress:
        starting = progress.add_task(f"{what}: starting engines", total=len(names))
        try:
            for name in names:
                sides.append(Side(name, settings, Path(logs)))
                progress.advance(starting)
            turns = progress.add_task(
                f"{what}: measuring", total=(rounds + 1) * len(loads) * len(sides)
            )
            for turn in range(rounds + 1):
                for load in loads:
                    for side in sides if turn % 2 else reversed(sides):
                        speed = side.measure(load, seed=turn)
                        if turn > 0:  # the first warms up
                            figures[load.what][side.name].append(speed)
                        progress.advance(turns)
        finally:
            for side in sides:
                side.close()
    return figures


def joined(parts: list[Figures]) -> Figures:
    """The figures of several starts as those of one."""
    return {
        load: {side: [x for part in parts for x in part[load][side]] for side in by_side}
        for load, by_side in parts[0].items()
    }


def to_rows(figures: Figures, what: str) -> list[Row]:
    """Ours against the better peer of each load."""
    rows = []
    for load, by_side in figures.items():
        peers = {name: values for name, values in by_side.items() if name != OURS}
        rows.append(compare(f"{what} {load}", by_side[OURS], peers, UNIT))
    return rows


def show_noise(figures: Figures, what: str, console: Console) -> None:
    for load, by_side in figures.items():
        cells = (
            f"{name} {median(values):,.0f} ±{spread(values):.0%}"
            for name, values in by_side.items()
        )
        console.print(f"  {what} {load}: " + ", ".join(cells), highlight=False)


Models = Annotated[list[str] | None, typer.Option(help="may be repeated")]
Ranks = Annotated[list[int] | None, typer.Option(help="ranks; may be repeated")]
Quick = Annotated[bool, typer.Option(help="eager unless --mode is given; few turns")]
File = Annotated[Path | None, typer.Option(help="write the rows to this file")]
Chosen = Annotated[list[str] | None, typer.Option(help="'decode 1x64' alone; may be repeated")]
How = Annotated[Mode, typer.Option(help="how vLLM runs the model")]
Turns = Annotated[int | None, typer.Option(help="turns of each side, in each start")]
Starts = Annotated[int, typer.Option(min=1, help="how many times all sides are started")]
Threads = Annotated[int | None, typer.Option(help="OpenMP threads of each engine")]
ProcessorTime = Annotated[
    bool, typer.Option(help="processor's seconds of one thread: for a busy machine, one rank")
]
PeersOnly = Annotated[bool, typer.Option(help="leave ours out, show the peers")]


def served_rows(
    shapes: dict[str, Shape],
    names: list[str],
    *,
    tp: list[int],
    mode: Mode,
    quick: bool,
    rounds: int | None,
    starts: int,
    threads: int | None,
    processor_time: bool,
    peers_only: bool,
    loads: list[str] | None,
) -> list[Row]:
    """The rows of some of the shapes. Arguments are the options of the command.

    Raises:
        typer.BadParameter: for a name that is none of the shapes' or loads', or processor's time of
            ranks.
    """
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one process a side, and one a rank
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # or all sides would be pinned to the same core
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    if processor_time:
        if set(tp) != {1}:
            raise typer.BadParameter("--processor-time counts one process: ranks wait by spinning")
        threads = 1
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    rounds = rounds or (3 if quick else 9)
    modes = ["eager", "compiled"] if mode is Mode.both else [mode.value]
    if quick and mode is Mode.both:
        modes = ["eager"]
    if unknown := set(names) - set(shapes):
        raise typer.BadParameter(f"--model {min(unknown)}: need one of {', '.join(shapes)}")
    chosen = [load for load in LOADS if loads is None or load.what in loads]
    if unknown := set(loads or []) - {load.what for load in LOADS}:
        known = ", ".join(load.what for load in LOADS)
        raise typer.BadParameter(f"--load {min(unknown)}: need one of {known}")
    console, rows = Console(), []
    for name in names:
        shape = shapes[name]
        backend = [TRANSFORMERS] if shape.backend else []
        sides = [*([] if peers_only else [OURS]), shape.peer, *backend]
        for ranks in tp:
            if ranks not in shape.tps:
                console.print(f"{shape.title}: {ranks} ranks do not divide its heads; left out")
                continue
            for each in modes:
                what = f"{name} tp {ranks} {each}"
                settings = Settings(
                    shape.folder(), each == "compiled", ranks, threads, processor_time
                )
                figures = joined(
                    [
                        measure(sides, settings, chosen, what=what, rounds=rounds)
                        for _ in range(starts)
                    ]
                )
                show_noise(figures, what, console)
                if not peers_only:
                    rows += to_rows(figures, what)
    return rows


def main(
    model: Models = None,
    tp: Ranks = None,
    quick: Quick = False,
    json: File = None,
    mode: How = Mode.both,
    rounds: Turns = None,
    starts: Starts = 1,
    threads: Threads = None,
    processor_time: ProcessorTime = False,
    peers_only: PeersOnly = False,
    load: Chosen = None,
) -> None:
    """Serving speed of the emitted class, vLLM's own class and the transformers backend."""
    rows = served_rows(
        SHAPES,
        model or ["smollm2"],
        tp=tp or [1],
        mode=mode,
        quick=quick,
        rounds=rounds,
        starts=starts,
        threads=threads,
        processor_time=processor_time,
        peers_only=peers_only,
        loads=load,
    )
    if rows:
        clock = ", processor time" if processor_time else ""
        report(f"Serving, bfloat16{clock}", rows, json)


if __name__ == "__main__":
    typer.run(main)
