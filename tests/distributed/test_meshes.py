"""Training on meshes equals training on one process: losses, gradients, weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compiler import fsdp
from tests.distributed.ranks import on_one, on_ranks
from tests.distributed.training import STEPS, batch, loaded, model, train, train_all

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
    return on_one(train, None)


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


@pytest.mark.slow
def test_each_rank_holds_its_share(alone: dict[str, Any], on_two: list[Any], on_four: list[Any]):
    whole = alone["numel"]
    for rank in (*on_two, *on_four):
        for name, found in rank.items():
            shares = {"dp2": 1, "fsdp2 x tp2": 4, "fsdp2 x tp2, sequence parallel": 4}
            expected = whole / shares.get(name, 2)
            assert expected <= found["numel"] <= 1.02 * expected  # norms are whole along tp


def train_large(meshes: dict[str, tuple[dict[str, int], dict[str, Any]]]) -> dict[str, Any]:
    """`train`, with every parameter that can be sent by itself."""
    fsdp.LARGE = 1
    into, sent = fsdp.Processes.start_gather_into, []

    def counted(self: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        assert x.untyped_storage().nbytes() == x.nbytes  # the shard itself, and no copy
        sent.append(out.numel())
        return into(self, x, out)

    fsdp.Processes.start_gather_into = counted  # type: ignore[method-assign]
    return {**train_all(meshes), "sent": sum(sent)}


@pytest.mark.slow
def test_large_parameters_are_sent_by_themselves(alone: dict[str, Any]):
    for rank in on_ranks(2, train_large, {"fsdp2": ON_TWO["fsdp2"]}):
        check(rank["fsdp2"], alone)
        assert rank["sent"] >= (STEPS + 1) * alone["numel"]  # in each backward, all of them


def whole_at_once() -> dict[str, int]:
    """The most elements of gathered parameters that were there at one time, and of all of them."""
    module = loaded(model(), {"fsdp": 2})
    now, most = 0, 0
    finish, free = fsdp.Gather.finish, fsdp._free

    def count(change: int) -> None:
        nonlocal now, most
        now += change
        most = max(most, now)

    def counted_finish(self: Any, started: Any, shards: Any) -> Any:
        params = finish(self, started, shards)
        count(sum(p.numel() for p in params))
        return params

    def counted_free(param: torch.Tensor) -> None:
        assert param.untyped_storage().nbytes() > 0
        free(param)
        assert param.untyped_storage().nbytes() == 0
        count(-param.numel())

    fsdp.Gather.finish, fsdp._free = counted_finish, counted_free  # type: ignore[method-assign]
    try:
        tokens, positions, _ = batch(0)
        loss = module(tokens[:, :-1], positions).square().mean()
        after_forward = now
        most_forward = most
        loss.backward()
    finally:
        fsdp.Gather.finish, fsdp._free = finish, free  # type: ignore[method-assign]
    return {"after": after_forward, "most": most_forward, "all": module.model.num_parameters}


@pytest.mark.slow
def test_whole_parameters_are_there_for_one_part_at_a_time():
    for found in on_ranks(2, whole_at_once):
        assert found["after"] == 0
        assert 0 < found["most"] < 0.5 * found["all"]  # a layer, or a table of the vocabulary
