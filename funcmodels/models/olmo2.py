"""OLMo 2: norms after attention and feed-forward instead of before, and on queries and keys.

Features: each half's output is normalised before it joins the stream (arXiv:2111.09883); queries
and keys are normalised over all heads at once; RMSNorm, RoPE, grouped-query attention, SwiGLU,
optional biases.
Paper: OLMo 2, arXiv:2501.00656; `transformers` modeling_olmo2.

Checked with: tiny random `transformers` models for each feature above; the sizes of
OLMo-2-1124-7B, 13B and OLMo-2-0425-1B.
Not supported: quantised checkpoints, attention dropout, partial rotary embeddings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.ops import einsum


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "olmo2"
    ONLY = {"hidden_act": ("silu",), "attention_dropout": (0, 0.0)}

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = unless_given(lambda hf: hf["num_attention_heads"])
    head_dim: int = unless_given(lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
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
    q, kv = "(heads head_dim)", "(kv_heads head_dim)"

    def attention_params() -> dict[str, Any]:
        weights = {
            "q": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: {q} hidden"),
            "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
            "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
            "o": P("hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden {q}"),
            "q_norm": P("heads head_dim", init="ones", hf=f"{attn}.q_norm.weight: {q}"),
            "k_norm": P("kv_heads head_dim", init="ones", hf=f"{attn}.k_norm.weight: {kv}"),
        }
        if not cfg.attention_bias:
            return weights
        zeros = functools.partial(P, init="zeros")
        return weights | {
            "q_bias": zeros("heads head_dim", hf=f"{attn}.q_proj.bias: {q}"),
            "k_bias": zeros("kv_heads head_dim", hf=f"{attn}.k_proj.bias: {kv}"),
            "v_bias": zeros("kv_heads head_dim", hf=f"{attn}.v_proj.bias: {kv}"),
            "o_bias": zeros("hidden", hf=f"{attn}.o_proj.bias"),
        }

    def layer() -> dict[str, Any]:
        return {
            "attn": attention_params(),
            "attn_norm": P("hidden", init="ones", hf=f"{at}.post_attention_layernorm.weight"),
            "mlp": {
                "gate": P("mlp hidden", hf=f"{mlp}.gate_proj.weight"),
                "up": P("mlp hidden", hf=f"{mlp}.up_proj.weight"),
                "down": P("hidden mlp", hf=f"{mlp}.down_proj.weight"),
            },
            "mlp_norm": P("hidden", init="ones", hf=f"{at}.post_feedforward_layernorm.weight"),
        }

    tree = {
        "embed": P("vocab hidden", hf="model.embed_tokens.weight"),
        "layers": [layer() for _ in range(cfg.num_hidden_layers)],
        "norm": P("hidden", init="ones", hf="model.norm.weight"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


def norm_over_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the features of all heads together: (*batch, seq, heads, head_dim) -> same."""
    flat = rearrange(x, "... h d -> ... (h d)")
    flat = ops.rms_norm(flat, rearrange(weight, "h d -> (h d)"), eps=eps, rounds_once=True)
    return rearrange(flat, "... (h d) -> ... h d", d=x.shape[-1])


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The hidden state's heads. With the bias it is rounded once: a norm comes next."""
    bias = None if bias is None else bias.flatten()
    return F.linear(x, weight.flatten(0, 1), bias).unflatten(-1, weight.shape[:2])


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Grouped-query self-attention with normalised, then rotated queries and keys."""
    q = project(x, p["q"], p.get("q_bias"))  # (*batch, seq, heads, head_dim)
    k = project(x, p["k"], p.get("k_bias"))  # (*batch, seq, kv_heads, head_dim)
    v = project(x, p["v"], p.get("v_bias"))  # (*batch, seq, kv_heads, head_dim)
    q = norm_over_heads(q, p["q_norm"], cfg.rms_norm_eps)
    k = norm_over_heads(k, p["k_norm"], cfg.rms_norm_eps)
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        max_position=cfg.max_position_embeddings,
    )
    o = ops.attention(q, k, v, segment_ids=segment_ids)  # (*batch, seq, heads, head_dim)
    return F.linear(o.flatten(-2), p["o"].flatten(1), p.get("o_bias"))  # (*batch, seq, hidden)


@fm.block
def mlp(p: Any, x: Tensor):
    """SwiGLU feed-forward: (*batch, seq, hidden) -> the same."""
    gate = einsum(x, p["gate"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    return einsum(ops.swiglu(gate, up), p["down"], "... f, e f -> ... e")  # (*batch, seq, hidden)


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention and feed-forward on the stream itself, each normalised and added to it."""
    h = attention(p["attn"], x, positions, segment_ids, cfg)
    x = x + ops.rms_norm(h, p["attn_norm"], eps=cfg.rms_norm_eps, rounds_once=True)
    return x + ops.rms_norm(mlp(p["mlp"], x), p["mlp_norm"], eps=cfg.rms_norm_eps, rounds_once=True)


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
    x = ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps, rounds_once=True)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The OLMo 2 of a config."""
    return fm.Model(
        "FmOlmo2ForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("Olmo2ForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
