"""`fm.fit` on meshes is `fm.fit` on one process: in parts, compiled, with uneven loss masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import funcmodels as fm
from funcmodels import ops
from tests.distributed.ranks import mesh_of, on_ranks
from tests.distributed.training import own_rows

VOCAB, SEQ, STEPS = 32, 8, 3
P = fm.axes(vocab=VOCAB, hidden=16, mlp=24)
MESHES = ("dp", "fsdp", "tp")
RUNS: dict[str, dict[str, Any]] = {
    "whole": {},
    "in two parts": {"microbatches": 2},
    "in two parts, compiled": {"microbatches": 2, "compile": "aot_eager"},
}


@fm.block
def layer(p: Any, x: Tensor) -> Tensor:
    """No attention, which would take most of the time that compiling takes."""
    h = ops.rms_norm(x, p["norm"], eps=1e-5)
    return x + torch.tanh(h @ p["up"].T) @ p["down"].T


def forward(params: Any, tokens: Tensor, positions: Tensor, segment_ids: Tensor | None = None):
    x = ops.embed(tokens, params["embed"])
    for p in params["layers"]:
        x = layer(p, x)
    return ops.unembed(x, params["embed"])


LAYER = {"norm": P("hidden", init="ones"), "up": P("mlp hidden"), "down": P("hidden mlp")}
MODEL = fm.Model(
    "Layers",
    config={},
    params={"embed": P("vocab hidden"), "layers": [LAYER, LAYER]},
    forward=forward,
    sharding={"vocab": "tp", "mlp": "tp"},
)


def batch(step: int) -> dict[str, Tensor]:
    """Four rows with other numbers of tokens that count; in batch 0, none in the second parts."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (4, SEQ), generator=generator)
    lengths = torch.tensor([7, 2, 4, 0]) if step else torch.tensor([7, 0, 4, 0])
    return {"tokens": tokens, "loss_mask": torch.arange(SEQ) < lengths[:, None]}


def fitted(dim: str | None, **settings: Any) -> dict[str, Any]:
    """Losses, whole weights after some steps of gradient descent, and the graphs compiled."""
    torch._dynamo.reset()
    counters.clear()
    module = fm.compile_to_torch(MODEL, None if dim is None else mesh_of(**{dim: 2})).reset(seed=0)

    def own(step: int) -> dict[str, Tensor]:
        rows = batch(step)
        return dict(zip(rows, own_rows(module, *rows.values()), strict=True))

    found = fm.fit(module, module.weights(), own, steps=STEPS, optimizer=fm.optim.sgd(0.3),
                   progress=False, **settings)  # fmt: skip
    return {
        "losses": found.losses,
        "weights": dict(fm.tree.items(module.whole(found.weights))),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": list(counters["graph_break"]),
    }


def fitted_all() -> dict[tuple[str, str], Any]:
    return {(dim, run): fitted(dim, **settings) for dim in MESHES for run, settings in RUNS.items()}


@pytest.fixture(scope="module")
def on_two() -> list[Any]:
    return on_ranks(2, fitted_all)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return fitted(None)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dim", MESHES)
def test_the_run_of_one_process(dim: str, run: str, on_two: list[Any], alone: dict[str, Any]):
    for rank in on_two:
        found = rank[dim, run]
        assert found["graphs"] == ("compile" in RUNS[run])  # one for all steps and parts
        assert not found["breaks"]
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-5, atol=1e-5)
