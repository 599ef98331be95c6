"""Qwen3: a pre-norm decoder that normalises each head of the queries and keys.

Features: RMSNorm (arXiv:1910.07467), QK norm over head_dim before RoPE (arXiv:2302.05442), RoPE
(arXiv:2104.09864) with default and yarn scaling, grouped-query attention (arXiv:2305.13245),
SwiGLU (arXiv:2002.05202), heads wider than hidden_size / heads, tied or untied embeddings, a window
in the layers after the first `max_window_layers`.
Paper: Qwen3, arXiv:2505.09388.

Checked with: tiny random `transformers` models for each feature above; the configs of 0.6B, 8B
and 32B. Published weights were not run.
Not supported: loading quantised checkpoints (the engine does), attention dropout, activations but
SiLU.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.ops import einsum


def _layer_types(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Windows, where they are used at all, begin above the first layers."""
    full = hf["num_hidden_layers"]
    if hf.get("sliding_window", 4096):
        full = min(full, hf.get("max_window_layers", 28))
    return ("full_attention",) * full + ("sliding_attention",) * (hf["num_hidden_layers"] - full)


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "qwen3"
    ONLY = {"hidden_act": ("silu",), "attention_dropout": (0, 0.0)}
    READS = ("max_window_layers",)

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] = unless_given(_layer_types)
    tie_word_embeddings: bool = False

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without a window that is not used."""
        return hf if hf.get("use_sliding_window") else {**hf, "sliding_window": None}


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a Qwen3, with their axes and the names of Hugging Face's checkpoints."""
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

    def layer() -> dict[str, Any]:
        return {
            "input_norm": P("hidden", init="ones", hf=f"{at}.input_layernorm.weight"),
            "attn": attention_params(),
            "post_norm": P("hidden", init="ones", hf=f"{at}.post_attention_layernorm.weight"),
            "mlp": {
                "gate": P("mlp hidden", hf=f"{mlp}.gate_proj.weight"),
                "up": P("mlp hidden", hf=f"{mlp}.up_proj.weight"),
                "down": P("hidden mlp", hf=f"{mlp}.down_proj.weight"),
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


@fm.block
def attention(
    p: Any,
    x: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None,
    window: int | None,
    cfg: Config,
):
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
    o = ops.attention(q, k, v, window=window, segment_ids=segment_ids)
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def mlp(p: Any, x: Tensor):
    """SwiGLU feed-forward: (*batch, seq, hidden) -> the same."""
    gate = einsum(x, p["gate"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    return einsum(ops.swiglu(gate, up), p["down"], "... f, e f -> ... e")


@fm.block
def decoder_layer(
    p: Any,
    x: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None,
    window: int | None,
    cfg: Config,
):
    """Attention and feed-forward, each on the normalised stream and added to it."""
    h = ops.rms_norm(x, p["input_norm"], eps=cfg.rms_norm_eps)
    x = x + attention(p["attn"], h, positions, segment_ids, window, cfg)
    h = ops.rms_norm(x, p["post_norm"], eps=cfg.rms_norm_eps)
    return x + mlp(p["mlp"], h)


def hidden(
    params: Any, tokens: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config
) -> Tensor:
    """Hidden states (*batch, seq, hidden) of tokens (*batch, seq), normalised."""
    x = ops.embed(tokens, params["embed"])  # (*batch, seq, hidden)
    for p, layer_type in zip(params["layers"], cfg.layer_types, strict=True):
        window = cfg.sliding_window if layer_type == "sliding_attention" else None
        x = decoder_layer(p, x, positions, segment_ids, window, cfg)
    return ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps)


def forward(
    params: Any,
    tokens: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    *,
    cfg: Config,
) -> Tensor:
    """Logits (*batch, seq, vocab) of tokens (*batch, seq); also (num_tokens,) -> (.., vocab)."""
    x = hidden(params, tokens, positions, segment_ids, cfg)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The Qwen3 of a config."""
    return fm.Model(
        "FmQwen3ForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("Qwen3ForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
