"""Gemma 2: four norms a layer, bounded scores and logits, and a window in every second layer.

Features: RMSNorm (arXiv:1910.07467) of weight - 1, before and after attention and feed-forward;
RoPE (arXiv:2104.09864); grouped-query attention (arXiv:2305.13245) whose scores, as the logits, are
bounded by tanh; GeGLU (arXiv:2002.05202); embeddings scaled by sqrt(hidden_size) in the model's
dtype; tied or untied embeddings.
Paper: Gemma 2, arXiv:2408.00118.

Checked with: tiny random `transformers` models for each feature above; the configs of 2B, 9B and
27B. Published weights were not run.
Not supported: attention to both sides, loading quantised checkpoints (the engine does), attention
dropout.
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
from funcmodels.ops import einsum


def _layer_types(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Every second layer sees everything."""
    kinds = ("sliding_attention", "full_attention")
    return tuple(kinds[i % 2] for i in range(hf["num_hidden_layers"]))


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "gemma2"
    ONLY = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_dropout": (0, 0.0),
        "use_bidirectional_attention": (False,),
        "cache_implementation": ("hybrid",),  # of generate() in transformers
    }
    # Older names of hidden_activation and sliding_window, which transformers does not read.
    READS = ("hidden_act", "sliding_window_size", "_attn_implementation")

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] = unless_given(_layer_types)
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    attention_bias: bool = False
    tie_word_embeddings: bool = True


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a Gemma 2, with their axes and the names of Hugging Face's checkpoints."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        kv_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        mlp=cfg.intermediate_size,
    )
    at = "model.layers.{layers}"
    attn, mlp = f"{at}.self_attn", f"{at}.mlp"
    kv = "(kv_heads head_dim)"
    zeros = functools.partial(P, init="zeros")  # the norms' too: they hold weight - 1

    def attention_params() -> dict[str, Any]:
        weights = {
            "q": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: (heads head_dim) hidden"),
            "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
            "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
            "o": P("hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden (heads head_dim)"),
        }
        if not cfg.attention_bias:
            return weights
        return weights | {
            "q_bias": zeros("heads head_dim", hf=f"{attn}.q_proj.bias: (heads head_dim)"),
            "k_bias": zeros("kv_heads head_dim", hf=f"{attn}.k_proj.bias: {kv}"),
            "v_bias": zeros("kv_heads head_dim", hf=f"{attn}.v_proj.bias: {kv}"),
            "o_bias": zeros("hidden", hf=f"{attn}.o_proj.bias"),
        }

    def layer() -> dict[str, Any]:
        return {
            "input_norm": zeros("hidden", hf=f"{at}.input_layernorm.weight"),
            "attn": attention_params(),
            "post_attn_norm": zeros("hidden", hf=f"{at}.post_attention_layernorm.weight"),
            "pre_mlp_norm": zeros("hidden", hf=f"{at}.pre_feedforward_layernorm.weight"),
            "mlp": {
                "gate": P("mlp hidden", hf=f"{mlp}.gate_proj.weight"),
                "up": P("mlp hidden", hf=f"{mlp}.up_proj.weight"),
                "down": P("hidden mlp", hf=f"{mlp}.down_proj.weight"),
            },
            "post_mlp_norm": zeros("hidden", hf=f"{at}.post_feedforward_layernorm.weight"),
        }

    tree = {
        "embed": P("vocab hidden", hf="model.embed_tokens.weight"),
        "layers": [layer() for _ in range(cfg.num_hidden_layers)],
        "norm": zeros("hidden", hf="model.norm.weight"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


def norm(x: Tensor, weight: Tensor, cfg: Config) -> Tensor:
    """RMSNorm whose checkpoint holds weight - 1."""
    return ops.rms_norm(x, weight, eps=cfg.rms_norm_eps, offset=1.0)


@fm.block
def attention(
    p: Any,
    x: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None,
    window: int | None,
    cfg: Config,
):
    """Grouped-query attention with bounded scores: (*batch, seq, hidden) -> the same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    if "q_bias" in p:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        max_position=cfg.max_position_embeddings,
    )
    o = ops.attention(
        q,
        k,
        v,
        scale=cfg.query_pre_attn_scalar**-0.5,
        window=window,
        softcap=cfg.attn_logit_softcapping,
        segment_ids=segment_ids,
    )
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def mlp(p: Any, x: Tensor):
    """GeGLU feed-forward: (*batch, seq, hidden) -> the same."""
    gate = einsum(x, p["gate"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    return einsum(ops.geglu(gate, up, approximate="tanh"), p["down"], "... f, e f -> ... e")


@fm.block
def decoder_layer(
    p: Any,
    x: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None,
    window: int | None,
    cfg: Config,
):
    """Attention and feed-forward, each between two norms, added to the stream."""
    h = norm(x, p["input_norm"], cfg)
    h = attention(p["attn"], h, positions, segment_ids, window, cfg)
    x = x + norm(h, p["post_attn_norm"], cfg)
    h = mlp(p["mlp"], norm(x, p["pre_mlp_norm"], cfg))
    return x + norm(h, p["post_mlp_norm"], cfg)


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
    # A tensor of x's dtype: bfloat16 rounds sqrt(3584) = 59.87 to 59.75, as in training.
    x = x * torch.full((), cfg.hidden_size**0.5, dtype=x.dtype, device=x.device)
    for p, layer_type in zip(params["layers"], cfg.layer_types, strict=True):
        window = cfg.sliding_window if layer_type == "sliding_attention" else None
        x = decoder_layer(p, x, positions, segment_ids, window, cfg)
    x = norm(x, params["norm"], cfg)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    logits = ops.unembed(x, head)  # (*batch, seq, vocab)
    if cfg.final_logit_softcapping is None:
        return logits
    return cfg.final_logit_softcapping * torch.tanh(logits / cfg.final_logit_softcapping)


def model(cfg: Config) -> fm.Model:
    """The Gemma 2 of a config."""
    return fm.Model(
        "FmGemma2ForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("Gemma2ForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
