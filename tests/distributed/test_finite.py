"""On a mesh too, `fm.fit` names what is not finite first, and the ranks that have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from tests.distributed.ranks import DEVICE, mesh_of, on_ranks

VOCAB, DIM = 32, 8
P = fm.axes(vocab=VOCAB, hidden=DIM)


@fm.block
def inner(p: Any, x: Tensor):
    return x * p["w"]


@fm.block
def layer(p: Any, x: Tensor):
    x = inner(p["inner"], x)
    # The square root of a negative number is not a number, and that of 0 has no derivative.
    return x + torch.sqrt(p["scale"]) * 0


def forward(params: Any, tokens: Tensor, positions: Tensor, segment_ids: Tensor | None = None):
    x = ops.embed(tokens, params["embed"])
    for p in params["layers"]:
        x = layer(p, x)
    return ops.unembed(x * torch.sqrt(params["last"]), params["embed"])


def ones() -> Any:
    return P("hidden", init="ones")


MODEL = fm.Model(
    "Sqrt",
    config={},
    params={
        "embed": P("vocab hidden"),
        "layers": [{"inner": {"w": ones()}, "scale": ones()} for _ in range(3)],
        "last": ones(),
    },
    forward=forward,
    sharding={"vocab": "tp"},
)
SPECIAL = 7  # a token that rank 1 alone has, where each has rows of its own
FAULTS: dict[str, dict[str, float]] = {
    "a block": {"layers.1.scale": -1.0},
    "a block inside, for one token": {"layers.2.inner.w": 10.0, "embed": 3e38},
    "after the blocks": {"last": -1.0},
    "a parameter": {"layers.0.scale": float("nan")},
    "a gradient": {"layers.0.scale": 0.0},
}
BOTH, SECOND = "on ranks 0, 1", "on rank 1"
SAID = {
    "a block": "block layer of layers.1, its call 2, {both}",
    "a block inside, for one token": "block inner of layers.2.inner.w, its call 3, {special}",
    "after the blocks": "what is computed after the last of 6 block calls, {both}",
    "a parameter": "the parameter layers.0.scale, before anything is computed, {both}",
    "a gradient": "the gradient of layers.0.scale, in the backward pass, {both}",
}
MESHES = ("dp", "fsdp", "tp")


def message_of(module: fm.CompiledModel, dim: str, fault: str) -> str:
    """What `fit` says on this rank."""
    weights = fm.init(MODEL, seed=0)
    for path, value in FAULTS[fault].items():
        whole = dict(fm.tree.items(weights))[path]
        (whole[SPECIAL] if path == "embed" else whole).fill_(value)
    module.load(weights)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, SPECIAL, 8]], device=DEVICE)
    rank = torch.distributed.get_rank()
    own = tokens if dim == "tp" else tokens[rank : rank + 1]
    with pytest.raises(fm.errors.NotFiniteError) as error:
        fm.fit(module, module.weights(), [{"tokens": own}], steps=2,
               optimizer=fm.optim.sgd(0.1), progress=False)  # fmt: skip
    assert error.value.batch["tokens"].equal(own)
    return str(error.value)


def own_loss(module: fm.CompiledModel) -> str:
    """What `fit` says of a mean over the rows of each process."""
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], device=DEVICE)[torch.distributed.get_rank()]
    at = torch.arange(4, device=DEVICE)[None]
    with pytest.raises(fm.errors.TrainingError) as error:
        fm.fit(module, module.load(fm.init(MODEL, seed=0)).weights(), [{"tokens": tokens[None]}],
               steps=2, optimizer=fm.optim.sgd(0.1), progress=False,
               loss=lambda m, w, b: m.pure(w, b["tokens"], at).square().mean(),
        )  # fmt: skip
    return str(error.value)


def disagreeing(module: Any, seed: int, number: int, weights: Any = None) -> str:
    """What `fit` says where a rank has weights, or a batch, of its own."""
    if weights is None:
        weights = module.reset(seed=seed).weights()
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])[number : number + 1]
    with pytest.raises(fm.errors.TrainingError) as error:
        fm.fit(module, weights, [{"tokens": tokens}], steps=2, optimizer=fm.optim.sgd(0.1),
               progress=False)  # fmt: skip
    return str(error.value)


def disagreements(modules: dict[str, fm.CompiledModel]) -> dict[str, str]:
    rank = torch.distributed.get_rank()
    return {
        "alone, weights": disagreeing(MODEL, 0, 0, fm.init(MODEL, seed=rank)),
        "alone, batch": disagreeing(MODEL, 0, rank, fm.init(MODEL, seed=0)),
        "dp, weights": disagreeing(modules["dp"], rank, rank),
        "tp, batch": disagreeing(modules["tp"], 0, rank),
    }


def messages() -> dict[str, dict[str, str]]:
    modules = {dim: fm.compile_to_torch(MODEL, mesh_of(**{dim: 2})) for dim in MESHES}
    found = {
        dim: {fault: message_of(module, dim, fault) for fault in FAULTS}
        for dim, module in modules.items()
    }
    found["own loss"] = {dim: own_loss(modules[dim]) for dim in ("dp", "fsdp")}
    return {**found, "disagreements": disagreements(modules)}


@pytest.fixture(scope="module")
def on_two() -> list[Any]:
    return on_ranks(2, messages)


@pytest.mark.slow
@pytest.mark.parametrize("dim", MESHES)
def test_what_is_not_finite_is_named(dim: str, on_two: list[Any]):
    special = BOTH if dim == "tp" else SECOND
    for found in on_two:
        for fault, said in SAID.items():
            message = found[dim][fault]
            assert said.format(both=BOTH, special=special) in message, message
            assert ("test_finite.py:" in message) == ("a block" in fault)


@pytest.mark.slow
def test_a_loss_of_ones_own_rows_is_refused(on_two: list[Any]):
    for found in on_two:
        for message in found["own loss"].values():
            assert "each process has a loss of its own" in message
            assert "module.mean(losses, mask)" in message


@pytest.mark.slow
def test_processes_that_do_not_belong_together_are_refused(on_two: list[Any]):
    said = {
        "alone, weights": "2 processes with other weights: on rank 1, embed",
        "alone, batch": "2 processes with other batches: on rank 1, tokens",
        "dp, weights": "got:  rank 1, of embed",
        "tp, batch": "got:  rank 1, in tokens",
    }
    for rank in on_two:
        for case, message in rank["disagreements"].items():
            assert said[case] in message, message
