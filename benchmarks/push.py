"""Time from a trainer's new weights to an engine that serves them, against going through a folder.

    python -m benchmarks.push [--quick] [--json FILE]

SmolLM2-135M-Instruct, bfloat16, one rank, eager; with the engine in the trainer's process, and in
one of its own. The weights are in memory on every side, and change in every turn. Peers: the
weights saved to a folder that the running engine reads again, by vLLM's own `reload_weights`, and
the engine started anew on that folder, without the imports where the process has them already. In
each turn every side takes its turn, and must then give the tokens that the first one gave.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.engine import start
from benchmarks.table import compare, report, spread
from examples.smollm2 import convert

PUSH, RELOAD, RESTART = "push_weights", "folder, reload_weights", "folder, new engine"
PLACES = {"one process": "0", "engine process": "1"}

Figures = dict[str, list[float]]


def tokens_of(llm: Any) -> list[int]:
    """What it answers to a fixed prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": list(range(100, 164))}
    return list(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids)


def measure(source: Path, rounds: int, log: Path) -> Figures:
    """Updates a second of every side, in each turn after the first. Runs in a fresh process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import funcmodels as fm

    model = fm.load_model(source)
    fm.register(model)
    weights = fm.load(model, source)
    figures: Figures = {PUSH: [], RELOAD: [], RESTART: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "weights"
        fm.save(model, weights, folder)
        llm = start(folder)

        def push(new: Any) -> None:
            fm.push_weights(llm, new)

        def reload(new: Any) -> None:
            fm.save(model, new, folder)
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            llm.reset_prefix_cache()

        def restart(new: Any) -> None:
            nonlocal llm
            fm.save(model, new, folder)
            llm.llm_engine.engine_core.shutdown()
            llm = start(folder)

        sides: dict[str, Callable[[Any], None]] = {PUSH: push, RELOAD: reload, RESTART: restart}
        for turn in range(rounds + 1):
            new = fm.tree.map(lambda w, by=1 + turn / 100: w * by, weights)
            answers = []
            for side, update in sides.items():
                push(weights)  # so that a side that did nothing would be seen
                begin = time.perf_counter()
                update(new)
                seconds = time.perf_counter() - begin
                answers.append(tokens_of(llm))
                if turn > 0:
                    figures[side].append(1 / seconds)
            assert answers == [answers[0]] * 3, answers
        llm.llm_engine.engine_core.shutdown()
    return figures


def main(
    quick: Annotated[bool, typer.Option(help="few turns")] = False,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
    rounds: Annotated[int | None, typer.Option(help="turns of each side")] = None,
) -> None:
    """Live weight updates against a folder that the engine reads again, and against a restart."""
    os.environ.update(
        VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
    )
    source = convert()
    console, rows = Console(), []
    for place, value in PLACES.items():
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = value
        with tempfile.TemporaryDirectory() as logs:
            log = Path(logs) / "engine.log"
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, context) as pool:
                try:
                    turns = rounds or (2 if quick else 7)
                    figures = pool.submit(measure, source, turns, log).result()
                except Exception:
                    console.print(log.read_text(errors="replace")[-3000:], markup=False)
                    raise
        for side, values in figures.items():
            console.print(
                f"  {place}, {side}: {1 / sorted(values)[len(values) // 2]:.3g} s "
                f"±{spread(values):.0%}",
                highlight=False,
            )
        peers = {side: values for side, values in figures.items() if side != PUSH}
        rows.append(compare(place, figures[PUSH], peers, "updates/s"))
    report("New weights for a running SmolLM2-135M, bfloat16, one rank", rows, json)


if __name__ == "__main__":
    typer.run(main)
