"""A model that reads its tokens in four ways: embedded, hashed, as values, and in each layer.

Embeddings join the values of some layers as in modded-nanoGPT; each layer has a narrow embedding of
its own, as Gemma 3n's have.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from tests.engine.unusual import TABLE, attention_weights, norm, project

LAYERS, HASHES = 3, 97
P = fm.axes(vocab=256, hidden=128, mlp=192, own=32, hashes=HASHES, width=64)


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, value: Tensor | None, segment_ids) -> Tensor:
    h = norm(x, p["norm"])
    q, k, v = (project(h, p[name]) for name in "qkv")
    if value is not None:
        v = v + p["mix"] * value.unflatten(-1, v.shape[-2:])
    q, k = ops.rope(q, k, positions, theta=1e4)
    o = ops.attention(q, k, v, segment_ids=segment_ids)
    return x + einsum(o, p["o"], "... h d, e h d -> ... e")


@fm.block
def mlp(p: Any, x: Tensor, tokens: Tensor) -> Tensor:
    h = norm(x, p["norm"])
    own = ops.embed(tokens, p["embed"]) @ p["widen"]
    h = torch.relu(einsum(h, p["up"], "... e, f e -> ... f") + own).square()
    return x + einsum(h, p["down"], "... f, e f -> ... e")


def hashed(tokens: Tensor) -> Tensor:
    """A number below HASHES; its product is beyond 32 bits."""
    return tokens * 2654435761 % HASHES


def forward(params: Any, tokens: Tensor, positions: Tensor, segment_ids=None) -> Tensor:
    x = ops.embed(tokens, params["embed"]) + ops.embed(hashed(tokens), params["hashed"])
    value = ops.embed(tokens, params["value"])
    for i, p in enumerate(params["layers"]):
        own = None if i == 1 else value
        x = attention(p["attn"], x, positions, own, segment_ids)
        x = mlp(p["mlp"], x, tokens)
    return ops.unembed(norm(x, params["norm"]), params["head"])


def layer(has_value: bool) -> dict[str, Any]:
    mix = {"mix": P("", init="ones")} if has_value else {}
    return {
        "attn": attention_weights() | mix,
        "mlp": {
            "norm": P("hidden", init="ones"),
            "embed": P("vocab own"),
            "widen": P("own mlp"),
            "up": P("mlp hidden"),
            "down": P("hidden mlp"),
        },
    }


model = fm.Model(
    "RereadingForCausalLM",
    config={"max_position_embeddings": 256},
    params={
        "embed": P("vocab hidden"),
        "hashed": P("hashes hidden"),
        "value": P("vocab width"),
        "layers": [layer(i != 1) for i in range(LAYERS)],
        "norm": P("hidden", init="ones"),
        "head": P("vocab hidden"),
    },
    forward=forward,
    sharding={**TABLE, "hashes": "tp"},
)
