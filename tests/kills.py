"""A small run that saves all the time, to be killed: its phases as seen from outside, its curve.

A moment is random within a phase, and phases take turns: drawn over the whole life alone, few would
fall into the milliseconds of the last save.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import funcmodels as fm
from tests.distributed.ranks import mesh_of
from tests.tiny_llama import tiny

STEPS, EVERY = 45, 3
PHASES = ("start-up", "first steps", "between saves", "while saving", "last save", "after it")


def model() -> fm.Model:
    return tiny(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4)


def train(folder: Path, rank: int = 0, fsdp: int = 1) -> None:
    """One life: from the newest checkpoint towards the end."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    asked = (folder / "asked").open("a", buffering=1)  # a line a batch, for who kills

    def batch(number: int) -> dict[str, Tensor]:
        """Drawn from torch's own generator too, which must be resumed for the curve to be same."""
        if rank == 0:
            asked.write(f"{number}\n")
        tokens = (torch.randint(0, 16, (2, 1)) + number + torch.arange(9)) % 16
        return fm.pack(list(tokens), 9)

    trained: Any = model()
    weights = fm.init(trained, seed=0)
    if fsdp > 1:
        trained = fm.compile_to_torch(trained, mesh_of(fsdp=fsdp)).reset(seed=0)
        weights = trained.weights()
    with asked:
        fm.fit(
            trained,
            weights,
            batch,
            steps=STEPS,
            optimizer=fm.optim.adamw(fm.optim.cosine(0.01, total=STEPS)),
            clip=1.0,
            checkpoints=fm.Checkpoints(folder / "checkpoints", keep=2),
            save_every=EVERY,
            log=folder / "log.jsonl",
            progress=False,
        )


class Run:
    """A run's folder, as it is seen by who kills its lives.

    Args:
        folder: is made.
        start: makes the processes of a life, started.
    """

    def __init__(self, folder: Path, start: Callable[[Path], list[Any]]) -> None:
        folder.mkdir()
        self.folder, self.start = folder, start
        self.checkpoints = fm.Checkpoints(folder / "checkpoints")
        self.asked_file = folder / "asked"
        self.begun = 0.0  # of the life at work, by the clock of the file system
        self.newest = 0  # checkpoint when it was started

    def live(self) -> list[Any]:
        """Start a life."""
        self.asked_file.write_text("")
        self.begun = self.asked_file.stat().st_mtime
        self.newest = self.checkpoints.latest() or 0
        return self.start(self.folder)

    def asked(self) -> list[int]:
        """The numbers of the batches that this life has asked for."""
        return [int(line) for line in self.asked_file.read_text().split()]

    def check_resumed(self) -> None:
        """This life went on from the newest whole checkpoint, if it has come so far."""
        asked = self.asked()
        assert asked == list(range(self.newest, self.newest + len(asked)))

    @property
    def done(self) -> bool:
        return self.checkpoints.latest() == STEPS

    def phase(self) -> str:
        """Where this life is, or was when it ended."""
        asked = self.asked()
        if self.done:
            return "after it"
        if not asked:
            return "start-up"
        writing = self._writing()
        if asked[-1] == STEPS - 1 and (writing or self._rows()[-1:] == [STEPS]):
            return "last save"
        if writing:
            return "while saving"
        return "first steps" if len(asked) <= EVERY else "between saves"

    def _writing(self) -> bool:
        """Whether something is being written or deleted, and not left by a life before."""
        for path in self.checkpoints.folder.glob(".step-*"):
            try:
                if path.stat().st_mtime > self.begun:
                    return True
            except OSError:  # gone by now
                continue
        return False

    def _rows(self) -> list[int]:
        return [step for step, _, _ in self.curve()]

    def curve(self) -> list[tuple[int, float, float]]:
        lines = (self.folder / "log.jsonl").read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [(r["step"], r["loss"], r["grad_norm"]) for r in rows if r["kind"] == "step"]

    def weights(self) -> dict[str, Tensor]:
        return dict(fm.tree.items(self.checkpoints.load_weights(model())))

    def finish(self) -> None:
        """A last life, which nobody kills."""
        lives = self.live()
        for life in lives:
            life.join()
        assert [life.exitcode for life in lives] == [0] * len(lives)
        self.check_resumed()
        assert self.done
        assert not list(self.checkpoints.folder.glob(".*"))  # what was half-written is gone

    def await_moment(self, phase: str, moments: random.Random, lives: list[Any]) -> None:
        """Sleep until a random moment of a phase, or until the life has ended."""
        batches = moments.randint(EVERY + 1, STEPS // 2)
        reached: dict[str, Callable[[], bool]] = {
            "start-up": lambda: True,
            "first steps": lambda: len(self.asked()) > 0,
            "between saves": lambda: len(self.asked()) >= batches,
            "while saving": lambda: len(self.asked()) >= batches and self._writing(),
            "last save": lambda: self.asked()[-1:] == [STEPS - 1],
            "after it": lambda: self.done,
        }
        longest = {"start-up": 0.15, "last save": 0.04, "after it": 0.1}.get(phase, 0.015)
        deadline = time.monotonic() + 60
        while not reached[phase]() and all(life.is_alive() for life in lives):
            assert time.monotonic() < deadline, f"the life never came to {phase}"
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, longest))
