"""`fm.check_grid` of three published models: what is valid, in less than a second."""

from __future__ import annotations

import itertools
import time

import pytest

import funcmodels as fm
from tests.models.zoo import rows

TP, PP, EP = (1, 2, 3, 8, 16, 64), (1, 2, 60, 127), (1, 8, 16, 256)


@pytest.mark.parametrize(
    ("row", "name", "layers", "experts"),
    [
        ("llama", "Llama-3.1-405B", 126, 0),
        ("qwen3_moe", "Qwen3-235B-A22B", 94, 128),
        ("deepseek_v3", "DeepSeek-V3", 61, 256),
    ],
    ids=["llama", "qwen3_moe", "deepseek_v3"],
)
def test_the_grid_in_less_than_a_second(row, name, layers, experts):
    """Of the processor's time for this process: the machine may have other work."""
    zoo = rows()[row].zoo
    model = zoo.model(zoo.Config.from_hf(rows()[row].published[name].config))
    fm.check_grid(rows()[row].model())  # imports what a first trace needs
    seconds = []
    for _ in range(2):
        begin = time.process_time()
        grid = fm.check_grid(model, tp=TP, pp=PP, ep=EP)
        seconds.append(time.process_time() - begin)
    assert set(grid.valid) == {
        (tp, pp, ep)
        for tp, pp, ep in itertools.product(TP, PP, EP)
        if tp != 3 and pp <= layers and (ep == 1 or (ep <= experts and ep % tp == 0))
    }
    assert min(seconds) < 1
