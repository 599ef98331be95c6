"""A recurrent model on two ranks equals the same on one: results and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funcmodels as fm
from tests.distributed.ranks import DEVICE, mesh_of, on_one, on_ranks
from tests.distributed.training import own_rows
from tests.engine.recurrences import recurrent_model

MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp": ({"dp": 2}, {}),
    "fsdp": ({"fsdp": 2}, {}),
    "tp": ({"tp": 2}, {}),
    "tp, sequence parallel": ({"tp": 2}, {"sequence_parallel": True}),
}


def results(mesh: Any, **options: Any) -> dict[str, Any]:
    """Logits of this process's packed rows, and the gradients of all rows' squares, whole."""
    model = recurrent_model("conv", "delta", "own")
    module = fm.compile_to_torch(model, mesh, **options).reset(seed=0)
    module = module if mesh else module.to(DEVICE)
    every = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    [tokens] = own_rows(module, every)
    positions = torch.arange(40).expand(tokens.shape).to(DEVICE)
    logits = module(tokens, positions, positions // 16)
    logits.square().sum().backward()
    used = [path for path, p in fm.tree.items(module.weights()) if p.grad is not None]
    grads = fm.tree.map(
        lambda p: torch.zeros_like(p) if p.grad is None else p.grad, module.weights()
    )
    rows = own_rows(module, torch.arange(2))[0]
    return {
        "rows": rows,
        "logits": logits.detach(),
        "used": used,  # a layer of its own kind reads some of its parameters only
        "gradients": dict(fm.tree.items(module.whole(grads))),
    }


def on_meshes() -> dict[str, dict[str, Any]]:
    return {name: results(mesh_of(**mesh), **options) for name, (mesh, options) in MESHES.items()}


@pytest.mark.slow
def test_two_ranks():
    alone = on_one(results, None)
    assert len(alone["used"]) > 15
    assert all(alone["gradients"][path].abs().max() > 1e-3 for path in alone["used"])
    for rank in on_ranks(2, on_meshes):
        for name, found in rank.items():
            want = alone["logits"][found["rows"]]
            torch.testing.assert_close(found["logits"], want, rtol=0, atol=1e-4)
            assert found["gradients"].keys() == alone["gradients"].keys()
            for path, grad in found["gradients"].items():
                want = alone["gradients"][path]
                torch.testing.assert_close(
                    grad, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()),
                    msg=lambda text, name=name, path=path: f"{name}, {path}: {text}",
                )  # fmt: skip
