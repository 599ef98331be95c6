"""Speed and memory of training: ours against `transformers`, eager and compiled, and against JAX.

    python -m benchmarks.train [--quick] [--mode eager|compiled|both] [--dtype NAME ...]
                               [--layers N] [--rows N] [--rounds N] [--threads N]
                               [--processor-time] [--no-gradient] [--no-scaling] [--jax-python PATH]
                               [--json FILE]

SmolLM2-135M's shape with random weights, the same on every side; packed sequences of 512 tokens; a
step is forward, backward and AdamW, on weights in the dtype of the row. Each side is a process of
its own; they take turns, A B C, C B A, ..., and the first turn is thrown away. Memory is the
largest resident memory of the process during its steps, compilation left out. The JAX side needs
the extra `jax`, in this environment or in that of `--jax-python`; without it, it is left out.
`--layers` changes the depth: Inductor takes minutes for 30, once a side.

Eager, `fm.grad_and_value` is held against `torch.func`'s and `torch.autograd.grad` of the same
loss, in bytes that torch's allocator gave out at once.

Then the weak scaling over two processes, of `benchmarks.scaling`, in a table of its own; not with
`--processor-time`, which sees no waiting.
"""

import json as json_
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import funcmodels as fm
from benchmarks import scaling as over_processes
from benchmarks import train_memory
from benchmarks.serve import Mode
from benchmarks.table import Row, compare, report, spread, write
from benchmarks.train_task import HF, QUICK_LAYERS, Task

EAGER = ("ours eager", "transformers eager")
COMPILED = ("ours compiled", "transformers compiled", "jax")
CLOSE = {"float32": 1e-3, "bfloat16": 2e-2}  # of the first losses, relative: one function


class Side:
    """A process that takes steps."""

    def __init__(self, task: Task, python: str, log: Path) -> None:
        self.task, self.log = task, log
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.train_side", task.text()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json_.loads(line[1:])
        raise RuntimeError(f"{self.task.side} ended\n{self.log.read_text()[-3000:]}")

    def measure(self, steps: int) -> dict[str, float]:
        """Tokens per second, and peak bytes."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        found = self.answer()
        return {"speed": steps * self.task.tokens / found["seconds"], "peak": found["peak"]}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


Figures = dict[str, dict[str, list[float]]]  # side -> speed or peak -> one figure a turn


def measure(tasks: list[Task], pythons: dict[str, str], rounds: int, console: Console) -> Figures:
    """Let the sides take turns."""
    figures: Figures = {t.side: {"speed": [], "peak": []} for t in tasks}
    sides: list[Side] = []
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as logs:
        try:
            for i, task in enumerate(tasks):  # one after another: each compiles on all cores
                sides.append(
                    Side(task, pythons.get(task.side, sys.executable), Path(logs) / str(i))
                )
                loss = sides[-1].answer()["loss"]
                console.print(f"  {task.dtype} {task.side}: first loss {loss:.4f}", highlight=False)
                losses.append(loss)
                if abs(loss - losses[0]) > CLOSE[task.dtype] * losses[0]:
                    raise RuntimeError(f"{task.side} finds another loss than {tasks[0].side}")
            for turn in range(rounds + 1):
                for side in sides if turn % 2 else reversed(sides):
                    found = side.measure(1)
                    if turn > 0:
                        for name, value in found.items():
                            figures[side.task.side][name].append(value)
        finally:
            for side in sides:
                side.close()
    return figures


def to_rows(figures: Figures, what: str, sides: tuple[str, ...]) -> list[Row]:
    """Speed and memory of ours, the first of `sides`, against the best of the others measured."""
    ours, *peers = [side for side in sides if side in figures]
    speed = {peer: figures[peer]["speed"] for peer in peers}
    rows = [compare(f"{what}, speed", figures[ours]["speed"], speed, "tokens/s")]
    for peer in peers:  # less is better, so each is held against ours by itself
        mine, its = (median(figures[side]["peak"]) / 1e9 for side in (ours, peer))
        rows.append(Row(f"{what}, memory", mine, its, peer, its / mine, "GB"))
    return rows


def show_noise(figures: Figures, what: str, console: Console) -> None:
    for side, found in figures.items():
        speed, peak = found["speed"], median(found["peak"]) / 1e9
        text = f"  {what} {side}: {median(speed):,.0f} tokens/s ±{spread(speed):.0%}, {peak:.2f} GB"
        console.print(text, highlight=False)


def main(
    quick: Annotated[bool, typer.Option(help="four layers, one row, few turns")] = False,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16")] = None,
    rows: Annotated[int | None, typer.Option(help="sequences of a batch")] = None,
    rounds: Annotated[int | None, typer.Option(help="turns of each side")] = None,
    threads: Annotated[int | None, typer.Option(help="OpenMP threads of torch's sides")] = None,
    mode: Annotated[Mode, typer.Option(help="how torch's sides run the model")] = Mode.both,
    layers: Annotated[int | None, typer.Option(help="layers of the model")] = None,
    processor_time: Annotated[
        bool, typer.Option(help="processor's seconds of one thread: for a busy machine")
    ] = False,
    gradient: Annotated[bool, typer.Option(help="memory of the gradient alone, too")] = True,
    scaling: Annotated[bool, typer.Option(help="two processes against one, too")] = True,
    jax_python: Annotated[Path | None, typer.Option(help="interpreter with the extra jax")] = None,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
) -> None:
    """Training steps of ours, transformers and JAX."""
    if processor_time:
        threads = 1
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    console, found = Console(), []
    pythons = {} if jax_python is None else {"jax": str(jax_python)}
    has_jax = jax_python is not None or find_spec("jax") is not None
    if not has_jax:
        console.print(r"JAX is not installed, and is left out: pip install funcmodels\[jax]")
    depth = layers or (QUICK_LAYERS if quick else HF["num_hidden_layers"])
    hf = {**HF, "num_hidden_layers": depth}
    groups = {Mode.eager: [EAGER], Mode.compiled: [COMPILED], Mode.both: [EAGER, COMPILED]}[mode]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json_.dumps(hf))
        model = fm.load_model(folder)
        fm.save(model, fm.init(model, seed=0, dtype=torch.float32), folder)
        for name in dtype or list(CLOSE):
            sides = [s for group in groups for s in group if s != "jax" or has_jax]
            batch = rows or (1 if quick else 4)
            tasks = [Task(s, folder, name, batch, processor_time) for s in sides]
            figures = measure(tasks, pythons, rounds or (2 if quick else 7), console)
            show_noise(figures, name, console)
            for group in groups:
                found += to_rows(
                    figures, f"{name} {'eager' if group is EAGER else 'compiled'}", group
                )
            if gradient and EAGER in groups:
                found += train_memory.rows(tasks[0])
    clock = ", processor time" if processor_time else ""
    title = f"Training, SmolLM2-135M of {depth} layers, CPU, forward, backward and AdamW{clock}"
    report(title, found, json)
    if scaling and not processor_time:
        over = over_processes.run(
            layers=depth, rows=rows or (1 if quick else 2), rounds=rounds or (2 if quick else 5)
        )
        if json is not None:
            write(found + over, json)


if __name__ == "__main__":
    typer.run(main)
