"""One GPU: is attention right there, is it fast, and how fast does a model train and decode?

    python -m benchmarks.gpu [--quick] [--part PART]... [--turns N] [--json FILE]

Correctness of every kernel against float64; TFLOP/s of attention against the best kernel called
directly; a training step against `transformers` and Flax; decoding in a CUDA graph. Without a GPU
it runs on the processor, where only `--quick` ends: that tests the script and measures nothing.
"""

import gc
import json
import os
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated

# Before torch starts: a step of a large model leaves holes that a later one does not fit in.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import typer
from rich.console import Console

from benchmarks import gpu_check
from benchmarks.gpu_attention import SEQS, TOKENS, speed
from benchmarks.gpu_decode import decoding
from benchmarks.gpu_time import DEVICE, machine, matrix_rate
from benchmarks.gpu_train import jax_training, training
from benchmarks.table import Row, report

PARTS = ("check", "attention", "train", "jax", "decode")


def main(
    quick: Annotated[bool, typer.Option(help="tiny sizes: tests the script")] = False,
    part: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(PARTS)}; all")] = None,
    turns: Annotated[int, typer.Option(help="of each side of a comparison")] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows here")] = None,
) -> None:
    """Measure, print a table for each part and a short one last, and write the rows."""
    parts = part or PARTS
    rate = matrix_rate(256 if quick else 8192)
    Console().print(f"{machine()}; bfloat16 matrix rate {rate / 1e12:.4g} TFLOP/s")
    rows: list[Row] = []

    def done(name: str, found: list[Row]) -> None:
        """Show a part, and keep what there is so far."""
        report(name, found)
        rows.extend(found)
        if json_file is not None:
            json_file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        _free()

    checking = gpu_check.start() if "check" in parts else None
    measure = training(quick=quick) if "train" in parts else None  # compiles while that checks
    if checking is not None:
        done("check", gpu_check.finish(checking))
    if measure is not None:
        found = measure(rate, turns)
        del measure
        done("train", found)
    if "attention" in parts:
        sizes = (256, (64, 128)) if quick else (TOKENS, SEQS)
        done("attention", speed(rate, tokens=sizes[0], seqs=sizes[1], count=turns))
    if "jax" in parts:
        steps = [row.ours for row in rows if row.what.startswith("training")]
        done("jax", jax_training(median(steps) if steps else 1.0, quick=quick, count=turns))
    if "decode" in parts:
        done("decode", decoding(quick=quick, count=turns))
    report("in short", _short(rows))
    if any(row.unit == gpu_check.UNIT and row.ratio < 1 for row in rows):
        raise typer.Exit(1)


def _free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def _short(rows: list[Row]) -> list[Row]:
    """The worst of the correctness, the worst ratio of attention, and all of the models."""
    errors = [r for r in rows if r.unit == gpu_check.UNIT]
    kernels = [r for r in rows if r.unit == "TFLOP/s" and r.peer_name != "matrix rate"]
    others = [r for r in rows if r.unit in ("tokens/s", "GB", "nats", "µs")]
    used = [r for r in rows if r.what == "model FLOP per second"]
    worst = [min(group, key=lambda r: r.ratio) for group in (errors, kernels) if group]
    return [*worst, *others, *used]


if __name__ == "__main__":
    typer.run(main)
