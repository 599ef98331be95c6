"""Mistral: a pre-norm decoder whose layers may all attend within a window.

Features: RMSNorm (arXiv:1910.07467), RoPE (arXiv:2104.09864), grouped-query attention
(arXiv:2305.13245), a sliding window (arXiv:2004.05150) in every layer or in none, SwiGLU
(arXiv:2002.05202), heads of another width than hidden_size / heads, tied or untied embeddings.
Paper: Mistral 7B, arXiv:2310.06825.

Checked with: tiny random `transformers` models for each feature above; the configs of Mistral 7B
v0.1 and v0.3, Nemo and Small 24B. Published weights were not run.
Not supported: loading quantised checkpoints (the engine does), attention dropout, activations but
SiLU, Ministral's layers of two kinds.
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

    MODEL_TYPE = "mistral"
    ONLY = {"hidden_act": ("silu",), "attention_dropout": (0, 0.0)}

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = unless_given(lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = 4096
    tie_word_embeddings: bool = False


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a Mistral, with their axes and the names of Hugging Face's checkpoints."""
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
        return {
            "q": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: (heads head_dim) hidden"),
            "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
            "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
            "o": P("hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden (heads head_dim)"),
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
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Grouped-query self-attention with rotary embeddings: (*batch, seq, hidden) -> the same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        max_position=cfg.max_position_embeddings,
    )
    o = ops.attention(q, k, v, window=cfg.sliding_window, segment_ids=segment_ids)
    return einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)


@fm.block
def mlp(p: Any, x: Tensor):
    """SwiGLU feed-forward: (*batch, seq, hidden) -> the same."""
    gate = einsum(x, p["gate"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    return einsum(ops.swiglu(gate, up), p["down"], "... f, e f -> ... e")


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention and feed-forward, each on the normalised stream and added to it."""
    h = ops.rms_norm(x, p["input_norm"], eps=cfg.rms_norm_eps)
    x = x + attention(p["attn"], h, positions, segment_ids, cfg)
    h = ops.rms_norm(x, p["post_norm"], eps=cfg.rms_norm_eps)
    return x + mlp(p["mlp"], h)


def hidden(
    params: Any, tokens: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config
) -> Tensor:
    """The normalised states that the logits are made of: (*batch, seq) -> (*batch, seq, hidden)."""
    x = ops.embed(tokens, params["embed"])  # (*batch, seq, hidden)
    for p in params["layers"]:
        x = decoder_layer(p, x, positions, segment_ids, cfg)
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
    """The Mistral of a config."""
    return fm.Model(
        "FmMistralForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("MistralForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
