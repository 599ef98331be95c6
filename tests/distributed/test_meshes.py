"""Training on meshes equals training on one process: losses, gradients, weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.ranks import on_ranks
from tests.distributed.training import train, train_all

ON_TWO: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp2": ({"dp": 2}, {}),
    "fsdp2": ({"fsdp": 2}, {}),
    "tp2": ({"tp": 2}, {}),
    "tp2, sequence parallel": ({"tp": 2}, {"sequence_parallel": True}),
}
ON_FOUR: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "fsdp2 x tp2": ({"fsdp": 2, "tp": 2}, {}),
    "fsdp2 x tp2, sequence parallel": ({"fsdp": 2, "tp": 2}, {"sequence_parallel": True}),
    "dp2 x fsdp2": ({"dp": 2, "fsdp": 2}, {}),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return train(None)


@pytest.fixture(scope="module")
def on_two() -> list[Any]:
    return on_ranks(2, train_all, ON_TWO)


@pytest.fixture(scope="module")
def on_four() -> list[Any]:
    return on_ranks(4, train_all, ON_FOUR)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TWO)
def test_two_ranks(name: str, alone: dict[str, Any], on_two: list[Any]):
    for rank in on_two:
        check(rank[name], alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks(name: str, alone: dict[str, Any], on_four: list[Any]):
    for rank in on_four:
        check(rank[name], alone)


def check(found: dict[str, Any], alone: dict[str, Any]) -> None:
    """float32, sums in another order: 1e-5 of each value, and of the largest of its tensor."""
    assert alone["losses"][0] > alone["losses"][-1]  # it learns something
    torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-5, atol=0)
    for kind in ("functional", "autograd", "weights"):
        for path, expected in alone[kind].items():
            torch.testing.assert_close(
                found[kind][path],
                expected,
                rtol=1e-5,
                atol=1e-5 * expected.abs().max().item(),
                msg=lambda m, path=path, kind=kind: f"{kind} {path}: {m}",
            )
