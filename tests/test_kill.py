"""kill -9 at random moments of a run that saves all the time: it always goes on, bit for bit.

Six kills by default, one a phase; FUNCMODELS_KILLS=50 for the number that the promise is about.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import forkserver
from tests.kills import PHASES, STEPS, Run, train

KILLS = int(os.environ.get("FUNCMODELS_KILLS", "6"))


def start(folder: Path) -> list[Any]:
    life = forkserver().Process(target=train, args=(folder,))
    life.start()
    return [life]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("error:.*is not whole")
def test_kill_at_random_moments(tmp_path):
    whole = Run(tmp_path / "whole", start)
    whole.finish()
    assert [step for step, _, _ in whole.curve()] == list(range(1, STEPS + 1))

    moments = random.Random(0)
    aims = [PHASES[i % len(PHASES)] for i in range(KILLS)]
    moments.shuffle(aims)
    runs, hit, from_, left = [Run(tmp_path / "killed-0", start)], Counter(), [], Counter()
    for aim in aims:
        run = runs[-1]
        [life] = run.live()
        run.await_moment(aim, moments, [life])
        life.kill()  # SIGKILL
        life.join()
        assert life.exitcode in (-signal.SIGKILL, 0)  # 0: it had just come to its end by itself
        hit[run.phase()] += 1
        run.check_resumed()
        from_.append(run.newest)
        left.update(path.suffix for path in run.checkpoints.folder.glob(".*"))
        if run.done:
            runs.append(Run(tmp_path / f"killed-{len(runs)}", start))
    print(f"\n{KILLS} kills in {len(runs)} runs: {dict(hit)}")
    print(f"lives began at steps {from_}; half-written things after a kill: {dict(left)}")

    for run in runs:
        run.finish()
        assert run.curve() == whole.curve()
        assert all((w == whole.weights()[path]).all() for path, w in run.weights().items())
    if 5 * len(PHASES) <= KILLS:
        assert set(hit) == set(PHASES)
