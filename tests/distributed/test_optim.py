"""Optimisers on parts of parameters do what they do on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funcmodels as fm
from tests import tiny_llama
from tests.distributed.ranks import mesh_of, on_ranks
from tests.distributed.training import model

MESHES = {"dp2 x fsdp2": {"dp": 2, "fsdp": 2}, "fsdp2 x tp2": {"fsdp": 2, "tp": 2}}
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
        lambda w: torch.randn(w.shape, generator=generator), tiny_llama.weights_of(model())
    )


def stepped(module: fm.CompiledModel, optimizer: fm.optim.Optimizer, *, donate: bool) -> Any:
    """Whole weights after some steps."""
    module.load(tiny_llama.weights_of(module.model))
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


def on_meshes() -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for name, sizes in MESHES.items():
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


@pytest.mark.slow
def test_steps_of_one_process():
    found = on_ranks(4, on_meshes)
    alone = fm.compile_to_torch(model())
    for kind, optimizer in optimizers().items():
        expected = stepped(alone, optimizer, donate=False)
        # A norm is summed in another order, and float64; a matrix is gathered to the last bit.
        rtol, atol = (0.0, 0.0) if kind == "muon" else (1e-4, 1e-5)
        for name in MESHES:
            for rank in found:
                torch.testing.assert_close(rank[name, kind], expected, rtol=rtol, atol=atol)
    wrong = found[0]["fsdp2 x tp2", "not asked"]
    expected = stepped(alone, optimizers()["clipped adamw"], donate=False)
    with pytest.raises(AssertionError):  # so the test sees a norm that is a part's
        torch.testing.assert_close(wrong, expected, rtol=1e-4, atol=1e-5)
