"""How long a model takes from function to source, by depth.

    python -m benchmarks.compile [--quick] [--json FILE]

Llama-3.1-405B's configuration, of which no weight is allocated. Each figure is the median over
processes, of the time that the processor worked: "first" is the first compilation of a process,
imports and declarations excluded; "again" is one after it, which has torch's lazy parts loaded.
The peer of the depth rows is 1.2 times a model of 2 layers: a ratio above 1 says that 124 layers
more cost less than a fifth. The rows below them are of `fm.explain`, tables included, and of
`fm.check_grid` for 24 layouts, for published configurations, each the first thing that a process
does.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.table import Row, report, spread

LAYERS = 126
LIMIT = 5.0  # seconds
# What else is measured -> its limit in seconds: the task, and the row and the name of a model.
STATIC = {
    ("explain", "llama", "Llama-3.1-405B"): 2.0,
    ("explain", "qwen3_moe", "Qwen3-235B-A22B"): 10.0,
    ("explain", "deepseek_v3", "DeepSeek-V3"): 10.0,
    ("check_grid", "llama", "Llama-3.1-405B"): 1.0,
    ("check_grid", "qwen3_moe", "Qwen3-235B-A22B"): 1.0,
    ("check_grid", "deepseek_v3", "DeepSeek-V3"): 1.0,
}
RANKS: dict[str, dict[str, Any]] = {
    "llama": {"tp": 8, "pp": 2},
    "qwen3_moe": {"tp": 8, "ep": 8},
    "deepseek_v3": {"tp": 64},
}
HF: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def main(
    quick: Annotated[bool, typer.Option(help="fewer processes, with more noise")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows here")] = None,
) -> None:
    """Measure, print a table, and write the rows where --json says."""
    found: dict[int, list[dict[str, float]]] = {2: [], LAYERS: []}
    static: dict[tuple[str, str, str], list[float]] = {what: [] for what in STATIC}
    for _ in track(range(3 if quick else 9), "compiling", console=Console(stderr=True)):
        for layers, turns in found.items():
            turns.append(_measure(str(layers)))
        for what, seconds in static.items():
            seconds.append(_measure("/".join(what))["first"])
    rows = []
    for what in ("first", "again"):
        deep, shallow = ([turn[what] for turn in found[n]] for n in (LAYERS, 2))
        ours, peer = median(deep), 1.2 * median(shallow)
        name = f"{LAYERS} layers, {what} ± {spread(deep):.0%}"
        rows.append(Row(name, ours, LIMIT, "the limit", LIMIT / ours, "s"))
        rows.append(Row(name, ours, peer, "1.2 x 2 layers", peer / ours, "s"))
    for what, limit in STATIC.items():
        ours = median(static[what])
        task, row, model = what
        ranks = "".join(f", {axis} {n}" for axis, n in RANKS[row].items() if task == "explain")
        name = f"{task} of {model}{ranks} ± {spread(static[what]):.0%}"
        rows.append(Row(name, ours, limit, "the limit", limit / ours, "s"))
    report("From function to source, and what is known without", rows, json_file)


def _measure(what: str) -> dict[str, float]:
    """Seconds of a first compilation, or other task, and of a second, in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.compile", "--child", what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _child(layers: int) -> None:
    from compiler.vllm_target import source_for_vllm
    from funcmodels.models import llama

    cfg = llama.Config.from_hf({**HF, "num_hidden_layers": layers})
    times = {}
    for what in ("first", "again"):
        model = llama.model(cfg)
        start = time.process_time()
        source_for_vllm(model)
        times[what] = time.process_time() - start
    print(json.dumps(times))


def _static(task: str, row: str, name: str) -> None:
    """The time of what needs no weights and no engine."""
    import funcmodels as fm
    from tests.models.zoo import rows

    tasks = {
        "explain": lambda model: str(fm.explain(model, **RANKS[row], device="h100")),
        "check_grid": lambda model: fm.check_grid(
            model, tp=[1, 2, 3, 4, 6, 8, 16, 32], pp=[1, 2, 4]
        ),
    }
    assert {fm.explain, fm.check_grid}  # the compiler is imported now
    zoo = rows()[row].zoo
    model = zoo.model(zoo.Config.from_hf(rows()[row].published[name].config))
    start = time.process_time()
    tasks[task](model)
    print(json.dumps({"first": time.process_time() - start}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        if sys.argv[2].isdigit():
            _child(int(sys.argv[2]))
        else:
            _static(*sys.argv[2].split("/"))
    else:
        typer.run(main)
