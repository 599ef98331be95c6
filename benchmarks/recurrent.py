"""Recurrent states: served beside vLLM's own classes, trained beside `transformers`.

    python -m benchmarks.recurrent [--part serve|train|all] [--model NAME ...] [--tp N ...]
                                   [--mode eager|compiled|both] [--quick] [--processor-time]
                                   [--load NAME ...] [--json FILE]

`serve` measures as `benchmarks.serve` does; vLLM's transformers backend serves no model with a
recurrent state. `train` is `benchmarks.recurrent_train`.
"""

from enum import StrEnum
from typing import Annotated

import typer

from benchmarks import serve
from benchmarks.recurrent_train import train_rows
from benchmarks.shapes import RECURRENT
from benchmarks.table import report


class Part(StrEnum):
    serve = "serve"
    train = "train"
    all = "all"


def main(
    part: Annotated[Part, typer.Option(help="what to measure")] = Part.all,
    model: serve.Models = None,
    tp: serve.Ranks = None,
    quick: serve.Quick = False,
    json: serve.File = None,
    mode: serve.How = serve.Mode.both,
    rounds: serve.Turns = None,
    starts: serve.Starts = 1,
    threads: serve.Threads = None,
    processor_time: serve.ProcessorTime = False,
    peers_only: serve.PeersOnly = False,
    load: serve.Chosen = None,
) -> None:
    """Recurrent states, served and trained, beside their peers."""
    rows = []
    if part is not Part.train:
        rows += serve.served_rows(
            RECURRENT,
            model or list(RECURRENT),
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
    if part is not Part.serve:
        rows += train_rows(quick=quick, rounds=rounds)
    if rows:
        report("Recurrent states", rows, json)


if __name__ == "__main__":
    typer.run(main)
