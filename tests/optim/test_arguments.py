"""Arguments of optimisers, transforms and schedules that cannot work, and what is said of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import funcmodels as fm
from funcmodels.errors import TrainingError

optim = fm.optim
NAN, INF = float("nan"), float("inf")
MATRICES = {"w": "r c -> r c"}


def muon(**changes: Any) -> Any:
    return optim.muon(**{"lr": 0.1, "matrices": MATRICES, "rest": optim.sgd(0.1), **changes})


# What is made, the start of what is said, and the fix.
REFUSED: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: optim.clip_by_global_norm(-1), "clip_by_global_norm: max_norm", "max_norm=1"),
    (lambda: optim.clip_by_global_norm(0), "clip_by_global_norm: max_norm", "max_norm=1"),
    (lambda: optim.clip_by_global_norm(NAN), "clip_by_global_norm: max_norm", "max_norm=1"),
    (lambda: optim.clip_by_global_norm(None), "clip_by_global_norm: max_norm", "max_norm=1"),
    (lambda: optim.scale_to_norm({}, torch.ones(()), -2.0), "scale_to_norm: max_", "max_norm=2"),
    (lambda: optim.sgd(-0.1), "sgd: lr", "lr=0.1"),
    (lambda: optim.sgd(NAN), "sgd: lr", "lr=0.0003"),
    (lambda: optim.adamw(INF), "adamw: lr", "lr=0.0003"),
    (lambda: optim.adamw("3e-4"), "adamw: lr", "lr=0.0003"),
    (lambda: optim.lion(torch.tensor(-0.5)), "lion: lr", "lr=0.5"),
    (lambda: muon(lr=-0.5), "muon: lr", "lr=0.5"),
    (lambda: optim.adamw(0.1, weight_decay=-0.5), "adamw: weight_decay", "weight_decay=0.5"),
    (lambda: optim.adamw(0.1, eps=-1e-8), "adamw: eps", "eps=1e-8"),
    (lambda: optim.adamw(0.1, betas=(0.9, 1.0)), "adamw: betas", "betas=(0.9, 0.999)"),
    (lambda: optim.adamw(0.1, betas=(-0.1, 0.9)), "adamw: betas", "betas=(0.9, 0.999)"),
    (lambda: optim.adamw(0.1, betas=0.9), "adamw: betas", "betas=(0.9, 0.999)"),
    (lambda: optim.lion(0.1, betas=(0.9, 0.99, 0.9)), "lion: betas", "betas=(0.9, 0.99)"),
    (lambda: optim.adamw(0.1, state_dtype=torch.int8), "adamw: the state", "torch.bfloat16"),
    (lambda: optim.sgd(0.1, momentum=9), "sgd: momentum", "momentum=0.9"),
    (lambda: optim.sgd(0.1, momentum=-0.9), "sgd: momentum", "momentum=0.9"),
    (lambda: muon(momentum=1.0), "muon: momentum", "momentum=0.95"),
    (lambda: muon(steps=0), "muon: steps", "steps=1"),
    (lambda: muon(adjust="adamw"), "muon: adjust", "adjust='original'"),
    (lambda: muon(rest=None), "muon: rest", "called"),
    (lambda: optim.constant(-1.0), "constant: peak", "peak=1.0"),
    (lambda: optim.constant(1.0, warmup=-5), "constant: warmup", "warmup=5"),
    (lambda: optim.linear(1.0, total=0), "linear: total", "total=1"),
    (lambda: optim.linear(1.0, total=10, final=-1.0), "linear: final", "final=1.0"),
    (lambda: optim.linear(1.0, total=10, warmup=11), "linear: a schedule is shorter", "total=11"),
    (lambda: optim.cosine(NAN, total=10), "cosine: peak", "peak=0.0"),
    (lambda: optim.cosine(1.0, total=1000, warmup=0.03), "cosine: warmup", "warmup=30, if 0.03"),
    (lambda: optim.cosine(1.0, total=9.5), "cosine: total", "total=10"),
    (lambda: optim.wsd(1.0, total=10, warmup=5, decay=10), "wsd: a schedule is sh", "total=15"),
    (lambda: optim.wsd(1.0, total=10, decay=-3), "wsd: decay", "decay=3"),
    (lambda: optim.chain(), "chain: the last link", "called"),
    (lambda: optim.chain(optim.adamw(0.1), optim.clip_by_global_norm(1.0)), "chain: the last",
     "called"),
    (lambda: optim.chain(optim.adamw(0.1), optim.sgd(0.1)), "chain: a link before", "chain(fm."),
    (lambda: optim.chain(1.0, optim.sgd(0.1)), "chain: a link before", "chain(fm."),
    (lambda: optim.chain(optim.adamw), "chain: the last link", "called"),
    (lambda: optim.partition({"w": optim.adamw}), "partition: 'w'", "called"),
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(REFUSED)))
def test_refused(i: int):
    make, said, fix = REFUSED[i]
    with pytest.raises(TrainingError, match=rf"fm\.optim\.{re.escape(said)}") as raised:
        make()
    lines = raised.value.lines
    assert lines["got"]
    assert lines["need"]
    assert fix in str(lines["fix"])


TAKEN: list[Callable[[], Any]] = [
    lambda: optim.clip_by_global_norm(INF),  # takes the norm, and leaves the gradients
    lambda: optim.clip_by_global_norm(1),
    lambda: optim.sgd(0.0),
    lambda: optim.sgd(torch.tensor(0.1)),
    lambda: optim.sgd(lambda step: -step),  # one's own schedule is one's own affair
    lambda: optim.adamw(1, betas=[0, 0], eps=0, weight_decay=0),
    lambda: optim.cosine(1.0, total=1e4, warmup=100.0),
    lambda: optim.linear(0.0, total=10, warmup=10, final=1.0),
    lambda: optim.wsd(1.0, total=10, warmup=0, decay=0),
    lambda: optim.chain(lambda grads, donate=False: grads, optim.sgd(0.1)),
    lambda: optim.chain(optim.frozen()),
]


@pytest.mark.parametrize("i", range(len(TAKEN)))
def test_taken(i: int):
    TAKEN[i]()


def test_every_number_is_refused_where_it_is_made_with_what_is_wrong_with_it():
    with pytest.raises(TrainingError) as raised:
        optim.clip_by_global_norm(-1)
    assert str(raised.value) == (
        "TrainingError: fm.optim.clip_by_global_norm: max_norm is out of range\n"
        "  got:  max_norm=-1\n"
        "  need: a number above 0\n"
        "  fix:  max_norm=1.0"
    )
