"""kill -9 of one of two processes that hold half of each parameter, or of both: both go on.

FUNCMODELS_KILLS_FSDP=24 for more than the few kills that run by default.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed.ranks import DEVICE, forkserver
from tests.kills import PHASES, STEPS, Run, train

KILLS = int(os.environ.get("FUNCMODELS_KILLS_FSDP", "4"))
# One process is left alone until it notices, or is killed too: with the other, or after this long.
NOTICES = 2.0


def live(folder: Path, rank: int, rendezvous: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}/file", rank=rank, world_size=2
    )
    train(folder, rank, fsdp=2)
    dist.destroy_process_group()


def start(folder: Path) -> list[Any]:
    rendezvous = tempfile.mkdtemp(dir=folder)  # a life of its own: nothing of a dead one is in it
    args = [(folder, rank, rendezvous) for rank in range(2)]
    lives = [forkserver().Process(target=live, args=each) for each in args]
    for life in lives:
        life.start()
    return lives


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(DEVICE != "cpu", reason="of files and processes, which a GPU has no part in")
@pytest.mark.filterwarnings("error:.*is not whole")
def test_kill_one_or_both(tmp_path):
    whole = Run(tmp_path / "whole", start)
    whole.finish()
    assert [step for step, _, _ in whole.curve()] == list(range(1, STEPS + 1))

    moments = random.Random(1)
    aims = [("while saving", "last save", "first steps", *PHASES)[i % 9] for i in range(KILLS)]
    runs, hit = [Run(tmp_path / "killed-0", start)], Counter()
    for i, aim in enumerate(aims):
        run = runs[-1]
        lives = run.live()
        run.await_moment(aim, moments, lives)
        first = lives[i % 2]
        first.kill()  # SIGKILL
        first.join()
        who = f"rank {i % 2}"
        if i % 4 >= 2:
            who = "both"
        else:
            lives[1 - i % 2].join(NOTICES)
        for life in lives:
            life.kill()
            life.join()
        hit[who, run.phase()] += 1
        run.check_resumed()
        if run.done:
            runs.append(Run(tmp_path / f"killed-{len(runs)}", start))
    print(f"\n{KILLS} kills in {len(runs)} runs:")
    print("\n".join(f"  {n}: {who}, {phase}" for (who, phase), n in hit.items()))

    for run in runs:
        run.finish()
        assert run.curve() == whole.curve()
        assert all((w == whole.weights()[path]).all() for path, w in run.weights().items())
