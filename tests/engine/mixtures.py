"""Models of experts that no published one is: routings, activations and ways to be stored."""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum

import funcmodels as fm
from funcmodels import ops

EXPERTS, GROUPS, HIDDEN, WIDTH, HEADS = 8, 4, 64, 64, 2
SIZES = {"vocab": 256, "hidden": HIDDEN, "heads": HEADS, "head_dim": 32, "experts": EXPERTS,
         "width": WIDTH, "mlp": 48}  # fmt: skip
P = fm.axes(**SIZES)
AT = "model.layers.{layers}"
IN_TURNS = f"{AT}.mlp.experts"
SHARDING: dict[str, str | None] = {"vocab": "tp", "heads": "tp"}
CUT = {"width": "tp", "experts": "ep"}


def grouped(p: Any, x: Any):
    """As DeepSeek-V3 routes: a bias chooses, two of four groups and two experts of them."""
    scores = einsum(x, p["router"], "... e, x e -> ... x").float().sigmoid()
    biased = scores + p["correction"]
    by_group = biased.unflatten(-1, (GROUPS, -1))
    chosen = by_group.topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
    mask = torch.zeros_like(biased[..., :GROUPS]).scatter(-1, chosen, 1.0)
    kept = by_group.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).flatten(-2)
    ids = kept.topk(2, dim=-1).indices
    weights = scores.gather(-1, ids)
    return 2.5 * weights / weights.sum(-1, keepdim=True), ids


def softmax_of_top(p: Any, x: Any):
    """As GPT-OSS routes: the softmax of the largest alone, in the model's dtype."""
    logits = einsum(x, p["router"], "... e, x e -> ... x") + p["router_bias"]
    top, ids = logits.topk(3, dim=-1)
    return top.softmax(-1), ids


def first(p: Any, x: Any):
    """One expert, with the weight that its logit says."""
    top, ids = einsum(x, p["router"], "... e, x e -> ... x").topk(1, dim=-1)
    return torch.sigmoid(top), ids


def shared_expert(p: Any, x: Any):
    up = torch.nn.functional.silu(einsum(x, p["shared_up"], "... e, f e -> ... f"))
    return einsum(up, p["shared_down"], "... f, e f -> ... e")


def stored(**names: str) -> dict[str, fm.Param]:
    """gate, up and down under these names of the checkpoint."""
    axes = {"gate": "experts width hidden", "up": "experts width hidden",
            "down": "experts hidden width"}  # fmt: skip
    return {name: P(axes[name], hf=names.get(name)) for name in axes}


# name -> routing, options of ops.experts, parameters, and the table's part of experts
KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, fm.Param], dict[str, str]]] = {
    "grouped, shared": (
        grouped,
        {"activation": "silu"},
        {
            **stored(),  # each in one tensor, named by its path
            "correction": P("experts", dtype=torch.float32),
            "shared_up": P("mlp hidden"),
            "shared_down": P("hidden mlp"),
        },
        {**CUT, "mlp": "tp"},
    ),
    "in turns, biased": (
        softmax_of_top,
        {"activation": "swigluoai", "alpha": 1.702, "limit": 7.0},
        {
            **stored(
                gate=f"{IN_TURNS}.gate_up_proj: experts hidden width[0:1/2]",
                up=f"{IN_TURNS}.gate_up_proj: experts hidden width[1:2/2]",
                down=f"{IN_TURNS}.down_proj: experts width hidden",
            ),
            "gate_bias": P("experts width", hf=f"{IN_TURNS}.gate_up_bias: experts width[0:1/2]"),
            "up_bias": P("experts width", hf=f"{IN_TURNS}.gate_up_bias: experts width[1:2/2]"),
            "down_bias": P("experts hidden", hf=f"{IN_TURNS}.down_bias"),
            "router_bias": P("experts"),
        },
        CUT,
    ),
    "gelu, one": (
        first,
        {"activation": "gelu_tanh"},
        stored(
            gate=f"{AT}.moe.experts.{{experts}}.w1.weight",
            up=f"{AT}.moe.experts.{{experts}}.w3.weight",
            down=f"{AT}.moe.experts.{{experts}}.w2.weight",
        ),
        CUT,
    ),
    "whole": (first, {"activation": "gelu"}, stored(), {}),  # on every rank
}


@fm.block
def mixture(p: Any, x: Any, kind: str):
    route, options, _, _ = KINDS[kind]
    weights, ids = route(p, x)
    biases = {name: p[name] for name in ("gate_bias", "up_bias", "down_bias") if name in p}
    y = ops.experts(x, weights, ids, p["gate"], p["up"], p["down"], **biases, **options)
    return y + shared_expert(p, x) if "shared_up" in p else y


@fm.block
def attention(p: Any, x: Any, positions: Any, segment_ids: Any):
    q = einsum(x, p["q"], "... e, h d e -> ... h d")
    k = einsum(x, p["k"], "... e, h d e -> ... h d")
    q, k = ops.rope(q, k, positions, theta=1e4)
    return einsum(
        ops.attention(q, k, k, segment_ids=segment_ids), p["o"], "... h d, e h d -> ... e"
    )


def model(kind: str) -> fm.Model:
    """Two layers of attention and experts."""
    _, _, params, table = KINDS[kind]
    if kind == "whole":  # of whatever sizes P has now
        params = stored()

    def layer() -> dict[str, Any]:
        return {
            "norm": P("hidden", init="ones"),
            "attn": {
                "q": P("heads head_dim hidden"),
                "k": P("heads head_dim hidden"),
                "o": P("hidden heads head_dim"),
            },
            "post": P("hidden", init="ones"),
            "mlp": {"router": P("experts hidden"), **params},
        }

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for p in params["layers"]:
            h = ops.rms_norm(x, p["norm"], eps=1e-6)
            x = x + attention(p["attn"], h, positions, segment_ids)
            x = x + mixture(p["mlp"], ops.rms_norm(x, p["post"], eps=1e-6), kind)
        return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-6), params["head"])

    tree = {
        "embed": P("vocab hidden"),
        "layers": [layer(), layer()],
        "norm": P("hidden", init="ones"),
        "head": P("vocab hidden"),
    }
    config = {"max_position_embeddings": 256}
    sharding = SHARDING | table
    return fm.Model("Mixture", config=config, params=tree, forward=forward, sharding=sharding)
