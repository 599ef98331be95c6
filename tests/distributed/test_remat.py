"""`@fm.block(remat=True)` on meshes: the same gradients as without, from less that is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import llama
from tests.distributed.ranks import on_one, on_ranks
from tests.distributed.training import batch, loaded, loss_on, model, own_rows


def again(block: Any) -> Any:
    return fm.block(remat=True)(block.__wrapped__)


layer_again, attention_again, mlp_again = map(
    again, (llama.decoder_layer, llama.attention, llama.mlp)
)


@fm.block
def layer_of_two(p, x, positions, segment_ids, cfg):
    """A layer that is kept, whose two blocks are computed again."""
    h = ops.rms_norm(x, p["input_norm"], eps=cfg.rms_norm_eps)
    x = x + attention_again(p["attn"], h, positions, segment_ids, cfg)
    return x + mlp_again(p["mlp"], ops.rms_norm(x, p["post_norm"], eps=cfg.rms_norm_eps))


LAYERS = {
    "kept": llama.decoder_layer,
    "layers again": layer_again,
    "blocks again": layer_of_two,
}
MESHES: dict[str, dict[str, int] | None] = {
    "one process": None,
    "fsdp2": {"fsdp": 2},
    "tp2": {"tp": 2},
}


def model_of(layer: Any) -> fm.Model:
    def forward(params, tokens, positions, segment_ids=None, *, cfg):
        x = ops.embed(tokens, params["embed"])
        for p in params["layers"]:
            x = layer(p, x, positions, segment_ids, cfg)
        return ops.unembed(ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps), params["head"])

    plain = model()
    cfg = plain.config
    return dataclasses.replace(plain, forward=lambda *args: forward(*args, cfg=cfg))


def found_of(mesh: str, layer: str) -> dict[str, Any]:
    """Whole gradients of several kinds, and the bytes that autograd keeps for the first."""
    module = loaded(model_of(LAYERS[layer]), MESHES[mesh])
    rows = own_rows(module, *batch(0))
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.data_ptr()] = t.nbytes
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = loss_on(module, module.weights(), *rows)
    loss.backward()
    weights = fm.tree.map(lambda p: p.detach(), module.weights())
    along = fm.tree.map(torch.ones_like, weights)

    def loss_of(w: Any) -> torch.Tensor:
        return loss_on(module, w, *rows)

    def slope(w: Any) -> torch.Tensor:
        return sum(g.sum() for g in fm.tree.leaves(torch.func.grad(loss_of)(w)))  # type: ignore[return-value]

    trees = {
        "autograd": fm.tree.map(lambda p: p.grad, module.weights()),
        "func": torch.func.grad(loss_of)(weights),
    }
    if mesh == "one process" or layer == "layers again":
        trees["twice"] = torch.func.grad(slope)(weights)
        trees["forward"] = torch.func.jvp(torch.func.grad(loss_of), (weights,), (along,))[1]
    if mesh == "fsdp2" and layer == "layers again":
        compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
        leaves = fm.tree.map(lambda p: p.clone().requires_grad_(), weights)
        compiled(leaves).backward()
        trees["compiled"] = fm.tree.map(lambda p: p.grad, leaves)
    whole = {kind: dict(fm.tree.items(module.whole(tree))) for kind, tree in trees.items()}
    return {"grads": whole, "kept": sum(kept.values()), "loss": loss.detach()}


def all_on(meshes: list[str]) -> dict[str, dict[str, Any]]:
    return {mesh: {layer: found_of(mesh, layer) for layer in LAYERS} for mesh in meshes}


@pytest.fixture(scope="module")
def on_two() -> list[Any]:
    return on_ranks(2, all_on, [name for name in MESHES if name != "one process"])


@pytest.fixture(scope="module")
def alone() -> Any:
    return on_one(found_of, "one process", "kept")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one process"])
def test_the_same_gradients_from_less(mesh: str, on_two: list[Any], alone: Any):
    for rank in on_two:
        found = rank[mesh]
        for layer in LAYERS:
            torch.testing.assert_close(found[layer]["loss"], alone["loss"], rtol=1e-5, atol=0)
            for kind, grads in found[layer]["grads"].items():
                for path, value in alone["grads"].get(kind, alone["grads"]["func"]).items():
                    torch.testing.assert_close(
                        grads[path],
                        value,
                        rtol=2e-5,
                        atol=2e-5 * value.abs().max().item(),
                        msg=lambda m, at=f"{layer} {kind} {path}": f"{at}: {m}",
                    )
        kept = {layer: found[layer]["kept"] for layer in LAYERS}
        assert kept["layers again"] < kept["blocks again"] < kept["kept"], kept
