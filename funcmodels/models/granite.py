"""Granite 3: a Llama with four multipliers in the place of learned scales.

Features: the embedding, the scores of attention, each half before it joins the stream and the
logits are scaled by constants (muP, arXiv:2203.03466); RMSNorm, RoPE, grouped-query attention,
SwiGLU, optional biases, tied or untied embeddings.
Paper: Granite 3.0 Language Models; `transformers` modeling_granite.

Checked with: tiny random `transformers` models for each feature above; the sizes of granite-3.1 2b
and 8b.
Not supported: quantised checkpoints, dropout (that of published configs is read, and none is done),
partial rotary embeddings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.ops import einsum


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "granite"
    ONLY = {"hidden_act": ("silu",), "pretraining_tp": (1,)}
    READS = ("attention_dropout",)  # published configs have 0.1; none is done here

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = unless_given(lambda hf: hf["num_attention_heads"])
    head_dim: int = unless_given(lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False


def params(cfg: Config) -> dict[str, Any]:
    """The parameters, with their axes and the names of Hugging Face's checkpoints."""
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
        weights = {
            "gate": P("mlp hidden", hf=f"{mlp}.gate_proj.weight"),
            "up": P("mlp hidden", hf=f"{mlp}.up_proj.weight"),
            "down": P("hidden mlp", hf=f"{mlp}.down_proj.weight"),
        }
        if not cfg.mlp_bias:
            return weights
        return weights | {
            "gate_bias": P("mlp", init="zeros", hf=f"{mlp}.gate_proj.bias"),
            "up_bias": P("mlp", init="zeros", hf=f"{mlp}.up_proj.bias"),
            "down_bias": P("hidden", init="zeros", hf=f"{mlp}.down_proj.bias"),
        }

    def layer() -> dict[str, Any]:
        return {
            "input_norm": P("hidden", init="ones", hf=f"{at}.input_layernorm.weight"),
            "attn": attention_params(),
            "post_norm": P("hidden", init="ones", hf=f"{at}.post_attention_layernorm.weight"),
            "mlp": mlp_params(),
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
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Grouped-query self-attention whose scores are scaled by `attention_multiplier`."""
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
    o = ops.attention(q, k, v, scale=cfg.attention_multiplier, segment_ids=segment_ids)
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def mlp(p: Any, x: Tensor):
    """SwiGLU feed-forward: (*batch, seq, hidden) -> the same."""
    gate = einsum(x, p["gate"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    if "gate_bias" in p:
        gate, up = gate + p["gate_bias"], up + p["up_bias"]
    down = einsum(ops.swiglu(gate, up), p["down"], "... f, e f -> ... e")  # (*batch, seq, hidden)
    return down + p["down_bias"] if "down_bias" in p else down


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention and feed-forward, each on the normalised stream, scaled and added to it."""
    h = ops.rms_norm(x, p["input_norm"], eps=cfg.rms_norm_eps)
    x = x + attention(p["attn"], h, positions, segment_ids, cfg) * cfg.residual_multiplier
    h = ops.rms_norm(x, p["post_norm"], eps=cfg.rms_norm_eps)
    return x + mlp(p["mlp"], h) * cfg.residual_multiplier


def forward(
    params: Any,
    tokens: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    *,
    cfg: Config,
) -> Tensor:
    """Logits (*batch, seq, vocab) of tokens (*batch, seq); also (num_tokens,) -> (.., vocab)."""
    x = ops.embed(tokens, params["embed"]) * cfg.embedding_multiplier  # (*batch, seq, hidden)
    for p in params["layers"]:
        x = decoder_layer(p, x, positions, segment_ids, cfg)
    x = ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head) / cfg.logits_scaling  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The Granite of a config."""
    return fm.Model(
        "FmGraniteForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("GraniteForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
