"""A recurrent model on two ranks equals the same on one: results and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funcmodels as fm
from tests.distributed.ranks import DEVICE, mesh_of, on_one, on_ranks
from tests.engine.recurrences import recurrent_model

MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp": ({"dp": 2}, {}),
    "fsdp": ({"fsdp": 2}, {}),
    "tp": ({"tp": 2}, {}),
    "tp, sequence parallel": ({"tp": 2}, {"sequence_parallel": True}),
}


def results(mesh: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Logits of packed rows, and the gradients of their sum of squares, whole."""
    model = recurrent_model("conv", "delta", "own")
    module = fm.compile_to_torch(model, mesh, **options).reset(seed=0)
    module = module if mesh else module.to(DEVICE)
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    positions = torch.arange(40).expand(2, 40).to(DEVICE)
    logits = module(tokens, positions, positions // 16)
    logits.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def on_meshes() -> dict[str, dict[str, torch.Tensor]]:
    return {name: results(mesh_of(**mesh), **options) for name, (mesh, options) in MESHES.items()}


@pytest.mark.slow
def test_two_ranks():
    alone = on_one(results, None)
    for rank in on_ranks(2, on_meshes):
        for name, found in rank.items():
            torch.testing.assert_close(found["logits"], alone["logits"], rtol=0, atol=1e-4)
            norm = "layers.1.norm"  # whole on each rank of tp
            if name.startswith("tp"):
                torch.testing.assert_close(found[norm], alone[norm], rtol=1e-4, atol=1e-4)
