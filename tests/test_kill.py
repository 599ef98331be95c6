"""kill -9 at random moments of a run that saves all the time: it always goes on, bit for bit.

Five kills by default; FUNCMODELS_KILLS=50 for the number that the promise is about.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import funcmodels as fm
from tests.distributed.ranks import forkserver
from tests.tiny_llama import tiny

KILLS = int(os.environ.get("FUNCMODELS_KILLS", "5"))
STEPS = 60 + 20 * KILLS  # enough that no run reaches the end between two kills


def batch(number: int) -> dict[str, Tensor]:
    """Drawn from torch's own generator too, which must be resumed for the curve to be the same."""
    tokens = (torch.randint(0, 16, (2, 1)) + number + torch.arange(9)) % 16
    return fm.pack(list(tokens), 9)


def run(folder: Path) -> None:
    """One life of the training process: from the newest checkpoint towards the end."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tiny(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4)
    fm.fit(
        model,
        fm.init(model, seed=0),
        batch,
        steps=STEPS,
        optimizer=fm.optim.adamw(fm.optim.cosine(0.01, total=STEPS)),
        clip=1.0,
        checkpoints=fm.Checkpoints(folder / "checkpoints", keep=2),
        save_every=3,
        log=folder / "log.jsonl",
        progress=False,
    )


def curve(folder: Path) -> list[tuple[int, float, float]]:
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"]) for r in rows if r["kind"] == "step"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_at_random_moments(tmp_path):
    context = forkserver()
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = context.Process(target=run, args=(tmp_path / "whole",))
    whole.start()
    whole.join()
    assert whole.exitcode == 0

    moments, steps, left = random.Random(0), [], set()
    checkpoints = fm.Checkpoints(tmp_path / "killed" / "checkpoints")
    for _ in range(KILLS):
        life = context.Process(target=run, args=(tmp_path / "killed",))
        begun = checkpoints.latest() or 0
        life.start()
        # Not before it trains, or the kills would all hit the start of Python.
        deadline = time.monotonic() + 60
        while (checkpoints.latest() or 0) <= begun and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(life.pid, signal.SIGKILL)
        life.join()
        assert life.exitcode == -signal.SIGKILL, "the run ended before it was killed"
        steps.append(checkpoints.latest())
        left |= {path.name.split(".")[-1] for path in checkpoints.folder.glob(".*")}
    assert steps == sorted(steps)
    assert len(set(steps)) == KILLS  # each life went on from where the last had come to
    print(f"{KILLS} kills at steps {steps}; half-written things that were left: {left or 'none'}")

    last = context.Process(target=run, args=(tmp_path / "killed",))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == STEPS
    for file in ("whole", "killed"):
        assert fm.Checkpoints(tmp_path / file / "checkpoints").latest() == STEPS
    model = tiny(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4)
    one, other = (
        fm.Checkpoints(tmp_path / file / "checkpoints").load_weights(model)
        for file in ("whole", "killed")
    )
    fm.tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), one, other)
    assert not list(checkpoints.folder.glob(".*"))  # what was half-written is gone
