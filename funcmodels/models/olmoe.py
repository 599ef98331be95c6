"""OLMoE: a pre-norm decoder of many small experts, eight of 64 for each token.

Features: RMSNorm (arXiv:1910.07467), also of all queries and of all keys at once, before RoPE
(arXiv:2104.09864); optional clipping of queries, keys and values; a router that takes the softmax
over all experts and the k largest of it, renormalised or not; SwiGLU experts (arXiv:2002.05202).
Paper: OLMoE, arXiv:2409.02060.

Checked with: tiny random `transformers` models for each feature above; the configs of 1B-7B-0924
and 1B-7B-0125. Published weights were not run.
Not supported: quantised checkpoints, attention dropout, biases, activations but SiLU. The loss that
balances the experts is the training's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.ops import einsum


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "olmoe"
    ONLY = {
        "hidden_act": ("silu",),
        "attention_dropout": (0, 0.0),
        "attention_bias": (False,),
    }
    READS = ("output_router_logits", "router_aux_loss_coef")  # they weigh and report a loss

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = unless_given(lambda hf: hf["num_attention_heads"])
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False
    clip_qkv: float | None = None
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a OLMoE, with their axes and the names of its checkpoints."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        kv_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        mlp=cfg.intermediate_size,
        experts=cfg.num_experts,
    )
    at = "model.layers.{layers}"
    attn, ffn = f"{at}.self_attn", f"{at}.mlp"
    kv = "(kv_heads head_dim)"

    def layer() -> dict[str, Any]:
        one = f"{ffn}.experts.{{experts}}"
        return {
            "input_norm": P("hidden", init="ones", hf=f"{at}.input_layernorm.weight"),
            "attn": {
                "q": P(
                    "heads head_dim hidden", hf=f"{attn}.q_proj.weight: (heads head_dim) hidden"
                ),
                "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
                "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
                "q_norm": P(
                    "heads head_dim", init="ones", hf=f"{attn}.q_norm.weight: (heads head_dim)"
                ),
                "k_norm": P("kv_heads head_dim", init="ones", hf=f"{attn}.k_norm.weight: {kv}"),
                "o": P(
                    "hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden (heads head_dim)"
                ),
            },
            "post_norm": P("hidden", init="ones", hf=f"{at}.post_attention_layernorm.weight"),
            "mlp": {
                "router": P("experts hidden", hf=f"{ffn}.gate.weight"),
                "gate": P("experts mlp hidden", hf=f"{one}.gate_proj.weight"),
                "up": P("experts mlp hidden", hf=f"{one}.up_proj.weight"),
                "down": P("experts hidden mlp", hf=f"{one}.down_proj.weight"),
            },
        }

    tree = {
        "embed": P("vocab hidden", hf="model.embed_tokens.weight"),
        "layers": [layer() for _ in range(cfg.num_hidden_layers)],
        "norm": P("hidden", init="ones", hf="model.norm.weight"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


def all_heads_norm(x: Tensor, weight: Tensor, cfg: Config) -> Tensor:
    """The norm over all heads of (*batch, seq, heads, head_dim) at once."""
    flat = ops.rms_norm(x.flatten(-2), weight.flatten(), eps=cfg.rms_norm_eps)
    return flat.unflatten(-1, x.shape[-2:])


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention of normalised, rotated heads: (*batch, seq, hidden) -> the same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    q = all_heads_norm(q, p["q_norm"], cfg)
    k = all_heads_norm(k, p["k_norm"], cfg)
    if cfg.clip_qkv is not None:
        q, k, v = (t.clamp(-cfg.clip_qkv, cfg.clip_qkv) for t in (q, k, v))
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        max_position=cfg.max_position_embeddings,
    )
    o = ops.attention(q, k, v, segment_ids=segment_ids)
    return einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)


@fm.block
def mixture(p: Any, x: Tensor, cfg: Config):
    """Each token by its k experts: (*batch, seq, hidden) -> the same."""
    logits = einsum(x, p["router"], "... e, x e -> ... x")  # (*batch, seq, experts)
    scores = logits.softmax(-1, dtype=torch.float32)
    weights, ids = scores.topk(cfg.num_experts_per_tok, dim=-1)  # (*batch, seq, k)
    if cfg.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights.to(x.dtype)
    return ops.experts(x, weights, ids, p["gate"], p["up"], p["down"], activation="silu")


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention and experts, each on the normalised stream and added to it."""
    h = ops.rms_norm(x, p["input_norm"], eps=cfg.rms_norm_eps)
    x = x + attention(p["attn"], h, positions, segment_ids, cfg)
    h = ops.rms_norm(x, p["post_norm"], eps=cfg.rms_norm_eps)
    return x + mixture(p["mlp"], h, cfg)


def forward(
    params: Any,
    tokens: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    *,
    cfg: Config,
) -> Tensor:
    """Logits (*batch, seq, vocab) of tokens (*batch, seq); also (num_tokens,) -> (.., vocab)."""
    x = ops.embed(tokens, params["embed"])  # (*batch, seq, hidden)
    for p in params["layers"]:
        x = decoder_layer(p, x, positions, segment_ids, cfg)
    x = ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The OLMoE of a config."""
    return fm.Model(
        "FmOlmoeForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={
            "vocab": "tp",
            "heads": "tp",
            "kv_heads": "tp",
            "mlp": "tp",
            "experts": "ep",
        },
        hf_config=cfg.to_hf(),
        hf_architectures=("OlmoeForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
