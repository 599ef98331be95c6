"""Optimisers on parts of parameters do what they do on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funcmodels as fm
from tests import tiny_llama
from tests.distributed.ranks import DEVICE, mesh_of, on_one, on_ranks
from tests.distributed.training import model

MESHES = {  # by how many ranks they have
    4: {"dp2 x fsdp2": {"dp": 2, "fsdp": 2}, "fsdp2 x tp2": {"fsdp": 2, "tp": 2}},
    2: {"fsdp2": {"fsdp": 2}, "tp2": {"tp": 2}},
}
STEPS = 2


def halved(grads: Any, *, donate: bool = False) -> Any:
    return fm.tree.map(lambda g: g / 2, grads)


def optimizers() -> dict[str, fm.optim.Optimizer]:
    optim = fm.optim
    muon = optim.muon(0.1, optim.matrices(model()), rest=optim.adamw(0.1))
    clip = optim.clip_by_global_norm(1.0)
    return {
        "muon": muon,
        "clipped adamw": optim.chain(clip, optim.adamw(0.1)),
        "clipped muon": optim.chain(clip, muon),
        "a part of them clipped": optim.partition(
            {"*norm*": optim.chain(clip, optim.sgd(0.1)), "*": optim.lion(0.1)}
        ),
    }


def gradients(step: int) -> Any:
    """Of any size; the same on all processes."""
    generator = torch.Generator().manual_seed(step)
    return fm.tree.map(
        lambda w: torch.randn(w.shape, generator=generator).to(DEVICE),
        tiny_llama.weights_of(model()),
    )


def stepped(module: fm.CompiledModel, optimizer: fm.optim.Optimizer, *, donate: bool) -> Any:
    """Whole weights after some steps."""
    module.load(tiny_llama.weights_of(module.model)).to(DEVICE)
    weights = fm.tree.map(lambda p: p.detach().clone(), module.weights())
    state = optimizer.init(weights)
    for step in range(STEPS):
        grads = gradients(step)
        if module.layout is not None:
            grads = fm.tree.map_with_path(
                lambda path, g: module.layout.local(path, g).clone(),  # type: ignore[union-attr]
                grads,
            )
        weights, state = optimizer.update(grads, state, weights, donate=donate)
    return dict(fm.tree.items(module.whole(weights)))


def on_meshes(ranks: int) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for name, sizes in MESHES[ranks].items():
        module = fm.compile_to_torch(model(), mesh_of(**sizes))
        for kind, optimizer in optimizers().items():
            able = fm.optim.sharded(optimizer, module)
            found[name, kind] = stepped(module, able, donate=kind == "clipped muon")
        plain = fm.optim.adamw(0.1)
        assert fm.optim.sharded(plain, module) is plain
        own = fm.optim.chain(halved, plain)
        with pytest.raises(fm.errors.TrainingError, match="each process holds a part of them"):
            fm.optim.sharded(own, module)
        found[name, "not asked"] = stepped(module, optimizers()["clipped adamw"], donate=False)
    return found


def alone(optimizer: fm.optim.Optimizer) -> Any:
    return stepped(fm.compile_to_torch(model()), optimizer, donate=False)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", MESHES)
def test_steps_of_one_process(ranks: int):
    found = on_ranks(ranks, on_meshes, ranks)
    for kind, optimizer in optimizers().items():
        expected = on_one(alone, optimizer)
        # A norm is summed in another order, and float64; a matrix is gathered to the last bit.
        rtol, atol = (0.0, 0.0) if kind == "muon" else (1e-4, 1e-5)
        for name in MESHES[ranks]:
            for rank in found:
                torch.testing.assert_close(rank[name, kind], expected, rtol=rtol, atol=atol)
    wrong = found[0][name, "not asked"]
    expected = on_one(alone, optimizers()["clipped adamw"])
    with pytest.raises(AssertionError):  # so the test sees a norm that is a part's
        torch.testing.assert_close(wrong, expected, rtol=1e-4, atol=1e-5)
