"""Serving speed of the emitted class against vLLM's own class and its transformers backend.

    python -m benchmarks.serve [--quick] [--json FILE] [--mode eager|compiled|both]

SmolLM2-135M-Instruct, bfloat16, tensor parallel 1, with vLLM's settings the same on all sides.
Each side is a process of its own that holds its engine; the sides take turns, A B C, C B A, ..., so
that whatever else the machine does, and its clock, hits all alike. The first turn is thrown away.
A figure is the median over the turns, and a ratio the median of the turns' ratios.
"""

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from benchmarks.engine import start
from benchmarks.table import Row, compare, report, spread
from examples.smollm2 import convert

OURS, LLAMA, TRANSFORMERS = "ours", "vLLM Llama", "transformers backend"
UNIT = "tokens/s"
START_TIMEOUT = 900.0


@dataclass(frozen=True)
class Load:
    """`batch` random prompts of `prompt` tokens, with `new` tokens generated for each."""

    what: str
    batch: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """What is counted: the prompts' tokens in a prefill load, else the new ones."""
        return self.batch * (self.prompt if self.new == 1 else self.new)


LOADS = [
    Load("prefill 8x256", batch=8, prompt=256, new=1),
    Load("decode 8x64", batch=8, prompt=8, new=64),
    Load("decode 1x64", batch=1, prompt=8, new=64),
]


class Mode(StrEnum):
    eager = "eager"
    compiled = "compiled"
    both = "both"


# --- one side, in its own process ----------------------------------------------------------------


def register_ours(folder: Path) -> str:
    """Compile the model and register it with vLLM; returns its architecture name."""
    from vllm import ModelRegistry

    import funcmodels as fm

    arch = "FuncmodelsBenchmark"  # a name of its own: vLLM caches classes by name
    ModelRegistry.register_model(arch, fm.compile_to_vllm(fm.load_model(folder)))
    return arch


def start_engine(side: str, folder: Path, *, compiled: bool) -> Callable[[Load, int], float]:
    """Start an engine; returns a function that runs a load and gives its seconds."""
    from vllm import SamplingParams

    settings = {
        "enforce_eager": not compiled,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
    }
    if side == OURS:
        settings["hf_overrides"] = {"architectures": [register_ours(folder)]}
    elif side == TRANSFORMERS:
        settings["model_impl"] = "transformers"
    llm = start(folder, **settings)

    def run(load: Load, seed: int) -> float:
        rng = random.Random(seed)  # the same tokens on every side
        prompts: Any = [
            {"prompt_token_ids": [rng.randrange(100, 40_000) for _ in range(load.prompt)]}
            for _ in range(load.batch)
        ]
        params = SamplingParams(
            temperature=0, max_tokens=load.new, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    return run


def side_main(
    pipe: Connection, side: str, folder: Path, compiled: bool, threads: int | None, log: Path
) -> None:
    """Answer each (load, seed) with seconds, until None."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run = start_engine(side, folder, compiled=compiled)
    if threads is not None:
        import torch

        assert torch.get_num_threads() == threads, "OMP_NUM_THREADS was not taken"
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        pipe.send(run(*request))


# --- the turns -----------------------------------------------------------------------------------


class Side:
    """A process that holds an engine."""

    def __init__(
        self, name: str, folder: Path, *, compiled: bool, threads: int | None, log_dir: Path
    ):
        self.name = name
        self.log = log_dir / f"{name.replace(' ', '-')}.log"
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        args = (theirs, name, folder, compiled, threads, self.log)
        self.process = context.Process(target=side_main, args=args, daemon=False)
        self.process.start()
        theirs.close()
        if self.answer(START_TIMEOUT) != "ready":
            raise RuntimeError(f"{name}: unexpected answer")

    def answer(self, timeout: float):
        try:
            if self.pipe.poll(timeout):
                return self.pipe.recv()
            reason = f"gave no answer in {timeout:.0f} s"
        except EOFError:
            reason = "ended"
        self.process.kill()
        tail = self.log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"the engine of {self.name!r} {reason}\n{tail}")

    def measure(self, load: Load, seed: int) -> float:
        """Tokens per second."""
        self.pipe.send((load, seed))
        return load.tokens / self.answer(600.0)

    def close(self) -> None:
        try:
            self.pipe.send(None)
            self.process.join(60)  # vLLM takes its time to end
        except OSError:  # it has gone already
            pass
        finally:
            self.process.kill()
            self.process.join()


Figures = dict[str, dict[str, list[float]]]  # load -> side -> one figure a turn


def measure(
    names: list[str], folder: Path, *, compiled: bool, rounds: int, threads: int | None
) -> Figures:
    """Let the sides take turns over all loads."""
    import tempfile

    figures: Figures = {load.what: {name: [] for name in names} for load in LOADS}
    sides: list[Side] = []
    columns = [SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn()]
    with tempfile.TemporaryDirectory() as logs, Progress(*columns, transient=True) as progress:
        mode = "compiled" if compiled else "eager"
        starting = progress.add_task(f"{mode}: starting engines", total=len(names))
        try:
            for name in names:
                sides.append(
                    Side(name, folder, compiled=compiled, threads=threads, log_dir=Path(logs))
                )
                progress.advance(starting)
            turns = progress.add_task(
                f"{mode}: measuring", total=(rounds + 1) * len(LOADS) * len(sides)
            )
            for turn in range(rounds + 1):
                for load in LOADS:
                    for side in sides if turn % 2 else reversed(sides):
                        speed = side.measure(load, seed=turn)
                        if turn > 0:  # the first warms up
                            figures[load.what][side.name].append(speed)
                        progress.advance(turns)
        finally:
            for side in sides:
                side.close()
    return figures


def to_rows(figures: Figures, mode: str) -> list[Row]:
    """Ours against the better peer of each load."""
    rows = []
    for what, by_side in figures.items():
        peers = {name: values for name, values in by_side.items() if name != OURS}
        rows.append(compare(f"{mode} {what}", by_side[OURS], peers, UNIT))
    return rows


def show_noise(figures: Figures, mode: str, console: Console) -> None:
    for what, by_side in figures.items():
        cells = (
            f"{name} {median(values):,.0f} ±{spread(values):.0%}"
            for name, values in by_side.items()
        )
        console.print(f"  {mode} {what}: " + ", ".join(cells), highlight=False)


def main(
    quick: Annotated[bool, typer.Option(help="eager only, few turns")] = False,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
    mode: Annotated[Mode, typer.Option(help="how vLLM runs the model")] = Mode.both,
    rounds: Annotated[int | None, typer.Option(help="turns of each side")] = None,
    threads: Annotated[int | None, typer.Option(help="OpenMP threads of each engine")] = None,
    peers_only: Annotated[bool, typer.Option(help="leave ours out, show the peers")] = False,
) -> None:
    """Serving speed of the emitted class, vLLM's Llama class and the transformers backend."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one process a side
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # or all sides would be pinned to the same core
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    folder = convert()
    rounds = rounds or (3 if quick else 9)
    modes = ["eager", "compiled"] if mode is Mode.both else [mode.value]
    if quick and mode is Mode.both:
        modes = ["eager"]
    names = [LLAMA, TRANSFORMERS] if peers_only else [OURS, LLAMA, TRANSFORMERS]
    console, rows = Console(), []
    for each in modes:
        figures = measure(
            names, folder, compiled=each == "compiled", rounds=rounds, threads=threads
        )
        show_noise(figures, each, console)
        if not peers_only:
            rows += to_rows(figures, each)
    if rows:
        report("Serving SmolLM2-135M, bfloat16, one rank", rows, json)


if __name__ == "__main__":
    typer.run(main)
