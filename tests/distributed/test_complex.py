"""Complex numbers within a model on a mesh: the gradients that go through them are those alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from tests.distributed.ranks import on_one, on_ranks
from tests.distributed.training import VOCAB, batch, loaded, loss_on, own_rows

P = fm.axes(vocab=VOCAB, hidden=16, heads=4, pairs=4, two=2)


@fm.block
def paired(p: Any, x: Tensor) -> Tensor:
    """Heads of pairs, as complex numbers, and one that all heads are turned by."""
    pairs = torch.einsum("...e,hpte->...hpt", x, p["up"])
    return torch.view_as_complex(pairs.float()) * torch.view_as_complex(p["turn"].float())


@fm.block
def joined(p: Any, z: Tensor) -> Tensor:
    return torch.einsum("...hpt,ehpt->...e", torch.view_as_real(z).to(p["down"].dtype), p["down"])


def forward(params: Any, tokens: Tensor, positions: Tensor, segment_ids: Any = None) -> Tensor:
    x = ops.embed(tokens, params["embed"])
    for p in params["layers"]:
        z = paired(p["first"], x)
        x = x + joined(p["second"], z * z)
    return ops.unembed(x, params["embed"])


def model() -> fm.Model:
    layer = {
        "first": {"up": P("heads pairs two hidden"), "turn": P("pairs two")},
        "second": {"down": P("hidden heads pairs two")},
    }
    tree = {"embed": P("vocab hidden"), "layers": [layer, layer]}
    return fm.Model("Paired", None, tree, forward, sharding={"vocab": "tp", "heads": "tp"})


def gradients(*meshes: dict[str, int] | None) -> list[dict[str, Tensor]]:
    found = []
    for mesh in meshes:
        module = loaded(model(), mesh)
        rows = own_rows(module, *batch(0))
        loss_on(module, module.weights(), *rows).backward()
        by_autograd = module.whole(fm.tree.map(lambda p: p.grad, module.weights()))
        weights = fm.tree.map(lambda p: p.detach(), module.weights())
        functional = torch.func.grad(lambda w, m=module, r=rows: loss_on(m, w, *r))(weights)
        for path, grad in fm.tree.items(module.whole(functional)):
            torch.testing.assert_close(grad, dict(fm.tree.items(by_autograd))[path])
        found.append(dict(fm.tree.items(by_autograd)))
    return found


def test_gradients_are_those_of_one_process():
    (alone,) = on_one(gradients, None)
    assert all(grad.abs().max() > 1e-3 for grad in alone.values())
    for rank in on_ranks(2, gradients, {"fsdp": 2}, {"tp": 2}):
        for found in rank:
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
