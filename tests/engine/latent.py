"""A model of no published checkpoint with latent attention, its queries from a latent too."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from torch import Tensor

import funcmodels as fm
from funcmodels import ops


@dataclass(frozen=True)
class Config:
    """Sizes; by default the engine caches the latents, whose size it has a kernel for."""

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 256
    q_lora_rank: int = 48
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 64
    v_head_dim: int = 32
    expands: bool = False  # makes keys and values itself


SMALL = {"kv_lora_rank": 64, "qk_rope_head_dim": 16}
WIDE_VALUES = {**SMALL, "v_head_dim": 64}


def params(cfg: Config) -> dict[str, Any]:
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        qk_dim=cfg.qk_nope_head_dim + cfg.qk_rope_head_dim,
        kv_dim=cfg.qk_nope_head_dim + cfg.v_head_dim,
        v_dim=cfg.v_head_dim,
        q_latent=cfg.q_lora_rank,
        latent=cfg.kv_lora_rank,
        latent_rope=cfg.kv_lora_rank + cfg.qk_rope_head_dim,
    )

    def layer() -> dict[str, Any]:
        return {
            "norm": P("hidden", init="ones"),
            "q_a": P("q_latent hidden"),
            "q_norm": P("q_latent", init="ones"),
            "q_b": P("heads qk_dim q_latent"),
            "kv_a": P("latent_rope hidden"),
            "kv_norm": P("latent", init="ones"),
            "kv_b": P("heads kv_dim latent"),
            "o": P("hidden heads v_dim"),
        }

    return {
        "embed": P("vocab hidden"),
        "layers": [layer() for _ in range(cfg.num_hidden_layers)],
        "norm": P("hidden", init="ones"),
    }


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    h = ops.rms_norm(x, p["norm"], eps=1e-6)
    q = ops.rms_norm(einsum(h, p["q_a"], "... e, r e -> ... r"), p["q_norm"], eps=1e-6)
    q = einsum(q, p["q_b"], "... r, h d r -> ... h d")
    kv = einsum(h, p["kv_a"], "... e, r e -> ... r")
    q_nope, q_rope = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], dim=-1)
    latent, k_rope = kv.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], dim=-1)
    latent = ops.rms_norm(latent, p["kv_norm"], eps=1e-6)
    q_rope, k_rope = ops.rope(
        q_rope, k_rope.unsqueeze(-2), positions, theta=10000.0, interleaved=True
    )
    if cfg.expands:
        kv = einsum(latent, p["kv_b"], "... r, h d r -> ... h d")
        k_nope, v = kv.split([cfg.qk_nope_head_dim, cfg.v_head_dim], dim=-1)
        k = torch.cat((k_nope, k_rope.expand(*q_rope.shape)), dim=-1)
        o = ops.attention(torch.cat((q_nope, q_rope), dim=-1), k, v, segment_ids=segment_ids)
    else:
        o = ops.latent_attention(q_nope, q_rope, latent, k_rope, p["kv_b"], segment_ids=segment_ids)
    return x + einsum(o, p["o"], "... h d, e h d -> ... e")


def forward(
    params: Any,
    tokens: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    *,
    cfg: Config,
) -> Tensor:
    x = ops.embed(tokens, params["embed"])
    for p in params["layers"]:
        x = attention(p, x, positions, segment_ids, cfg)
    return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-6), params["embed"])


def latent(**changes: Any) -> fm.Model:
    """The model of a config with some fields changed."""
    cfg = Config(**changes)
    return fm.Model(
        "LatentForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp"},
    )
