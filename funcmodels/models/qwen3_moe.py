"""Qwen3-MoE: Qwen3 with a mixture of experts in the place of the feed-forward layer.

Features: those of `models.qwen3` (RMSNorm, QK norm, RoPE, grouped-query attention); a router that
takes the softmax over all experts and the k largest of it, renormalised or not; SwiGLU experts
(arXiv:2002.05202); layers in between with a dense feed-forward, as `decoder_sparse_step` and
`mlp_only_layers` say.
Papers: Qwen3, arXiv:2505.09388; mixture of experts, arXiv:1701.06538.

Checked with: tiny random `transformers` models for each feature above; the configs of 30B-A3B and
235B-A22B. Published weights were not run.
Not supported: quantised checkpoints, attention dropout, windows, activations but SiLU. The loss
that balances the experts is the training's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.models.qwen3 import mlp
from funcmodels.ops import einsum


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "qwen3_moe"
    ONLY = {
        "hidden_act": ("silu",),
        "attention_dropout": (0, 0.0),
        "use_sliding_window": (False,),
        # Of Qwen3-Coder, which say what all of these models have.
        "qkv_bias": (None, False),
        "shared_expert_intermediate_size": (None, 0),
        "use_qk_norm": (None, True),
    }
    # A window is given where none is used; the others weigh and report a loss.
    READS = (
        "sliding_window",
        "max_window_layers",
        "output_router_logits",
        "router_aux_loss_coef",
        "num_local_experts",
    )

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = unless_given(lambda hf: hf["num_attention_heads"])
    head_dim: int = unless_given(lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """transformers 5 writes `num_experts` as `num_local_experts`."""
        if hf.get("num_local_experts") is None:
            return hf
        return {"num_experts": hf["num_local_experts"], **hf}

    def mixes(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a Qwen3-MoE, with their axes and the names of its checkpoints."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        kv_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        mlp=cfg.intermediate_size,
        experts=cfg.num_experts,
        expert_mlp=cfg.moe_intermediate_size,
    )
    at = "model.layers.{layers}"
    attn, ffn = f"{at}.self_attn", f"{at}.mlp"
    kv = "(kv_heads head_dim)"

    def attention_params() -> dict[str, Any]:
        weights = {
            "q": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: (heads head_dim) hidden"),
            "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
            "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
            "o": P("hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden (heads head_dim)"),
            "q_norm": P("head_dim", init="ones", hf=f"{attn}.q_norm.weight"),
            "k_norm": P("head_dim", init="ones", hf=f"{attn}.k_norm.weight"),
        }
        if not cfg.attention_bias:
            return weights
        zeros = functools.partial(P, init="zeros")
        return weights | {
            "q_bias": zeros("heads head_dim", hf=f"{attn}.q_proj.bias: (heads head_dim)"),
            "k_bias": zeros("kv_heads head_dim", hf=f"{attn}.k_proj.bias: {kv}"),
            "v_bias": zeros("kv_heads head_dim", hf=f"{attn}.v_proj.bias: {kv}"),
            "o_bias": zeros("hidden", hf=f"{attn}.o_proj.bias"),
        }

    def mlp_params() -> dict[str, Any]:
        return {
            "gate": P("mlp hidden", hf=f"{ffn}.gate_proj.weight"),
            "up": P("mlp hidden", hf=f"{ffn}.up_proj.weight"),
            "down": P("hidden mlp", hf=f"{ffn}.down_proj.weight"),
        }

    def mixture_params() -> dict[str, Any]:
        one = f"{ffn}.experts.{{experts}}"
        return {
            "router": P("experts hidden", hf=f"{ffn}.gate.weight"),
            "gate": P("experts expert_mlp hidden", hf=f"{one}.gate_proj.weight"),
            "up": P("experts expert_mlp hidden", hf=f"{one}.up_proj.weight"),
            "down": P("experts hidden expert_mlp", hf=f"{one}.down_proj.weight"),
        }

    def layer(index: int) -> dict[str, Any]:
        return {
            "input_norm": P("hidden", init="ones", hf=f"{at}.input_layernorm.weight"),
            "attn": attention_params(),
            "post_norm": P("hidden", init="ones", hf=f"{at}.post_attention_layernorm.weight"),
            "mlp": mixture_params() if cfg.mixes(index) else mlp_params(),
        }

    tree = {
        "embed": P("vocab hidden", hf="model.embed_tokens.weight"),
        "layers": [layer(index) for index in range(cfg.num_hidden_layers)],
        "norm": P("hidden", init="ones", hf="model.norm.weight"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Grouped-query attention of normalised, rotated heads: (*batch, seq, hidden) -> the same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    if "q_bias" in p:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    q = ops.rms_norm(q, p["q_norm"], eps=cfg.rms_norm_eps)
    k = ops.rms_norm(k, p["k_norm"], eps=cfg.rms_norm_eps)
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        max_position=cfg.max_position_embeddings,
    )
    o = ops.attention(q, k, v, segment_ids=segment_ids)
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def mixture(p: Any, x: Tensor, cfg: Any):
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
    return x + (mixture(p["mlp"], h, cfg) if "router" in p["mlp"] else mlp(p["mlp"], h))


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
    """The Qwen3-MoE of a config."""
    mixed = [cfg.mixes(index) for index in range(cfg.num_hidden_layers)]
    sharding: dict[str, str | None] = {"vocab": "tp", "heads": "tp", "kv_heads": "tp"}
    if any(mixed):
        sharding |= {"expert_mlp": "tp", "experts": "ep"}
    if not all(mixed):
        sharding |= {"mlp": "tp"}
    return fm.Model(
        "FmQwen3MoeForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding=sharding,
        hf_config=cfg.to_hf(),
        hf_architectures=("Qwen3MoeForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
