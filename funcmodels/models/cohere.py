"""Command-R: attention and feed-forward side by side, on one layer norm without bias.

Features: parallel blocks (arXiv:2204.02311), LayerNorm with a weight alone, RoPE that turns
neighbouring features, optional layer norms of queries and keys with a weight for each head
(Command-R+), SwiGLU, grouped-query attention, logits times a constant, tied embeddings.
Source: `transformers` modeling_cohere.

Checked with: tiny random `transformers` models for each feature above; the sizes of
c4ai-command-r-v01, c4ai-command-r-plus and aya-23-8B.
Not supported: quantised checkpoints, attention dropout, partial rotary embeddings.
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

    MODEL_TYPE = "cohere"
    ONLY = {
        "hidden_act": ("silu",),
        "attention_dropout": (0, 0.0),
        "pretraining_tp": (1,),
        "use_parallel_block": (True,),
        "rope_interleaved": (None, True),  # neighbours are turned, not halves
    }
    READS = ("model_max_length",)  # what serving is meant for; positions go on as they are

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = unless_given(lambda hf: hf["num_attention_heads"])
    head_dim: int = unless_given(lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    logit_scale: float = 0.0625
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    use_qk_norm: bool = False
    attention_bias: bool = False
    tie_word_embeddings: bool = True


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
        }
        if cfg.use_qk_norm:
            weights |= {
                "q_norm": P("heads head_dim", init="ones", hf=f"{attn}.q_norm.weight"),
                "k_norm": P("kv_heads head_dim", init="ones", hf=f"{attn}.k_norm.weight"),
            }
        if cfg.attention_bias:
            zeros = functools.partial(P, init="zeros")
            weights |= {
                "q_bias": zeros("heads head_dim", hf=f"{attn}.q_proj.bias: {q}"),
                "k_bias": zeros("kv_heads head_dim", hf=f"{attn}.k_proj.bias: {kv}"),
                "v_bias": zeros("kv_heads head_dim", hf=f"{attn}.v_proj.bias: {kv}"),
                "o_bias": zeros("hidden", hf=f"{attn}.o_proj.bias"),
            }
        return weights

    def layer() -> dict[str, Any]:
        return {
            "norm": P("hidden", init="ones", hf=f"{at}.input_layernorm.weight"),
            "attn": attention_params(),
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


def norm_each_head(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Layer norm of each head's features, with its own weight: (*batch, seq, heads, head_dim)."""
    # fp32: the product with the weight is taken before the result is rounded.
    return (ops.layer_norm(x.float(), None, eps=eps) * weight.float()).to(x.dtype)


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Grouped-query self-attention: (*batch, seq, hidden) -> the same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    if "q_bias" in p:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    if "q_norm" in p:
        q = norm_each_head(q, p["q_norm"], cfg.layer_norm_eps)
        k = norm_each_head(k, p["k_norm"], cfg.layer_norm_eps)
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        interleaved=True,
        max_position=cfg.max_position_embeddings,
    )
    o = ops.attention(q, k, v, segment_ids=segment_ids)  # (*batch, seq, heads, head_dim)
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def mlp(p: Any, x: Tensor):
    """SwiGLU feed-forward: (*batch, seq, hidden) -> the same."""
    gate = einsum(x, p["gate"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    return einsum(ops.swiglu(gate, up), p["down"], "... f, e f -> ... e")  # (*batch, seq, hidden)


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention and feed-forward, both on the same normalised stream, added to it together."""
    h = ops.layer_norm(x, p["norm"], eps=cfg.layer_norm_eps)
    return x + attention(p["attn"], h, positions, segment_ids, cfg) + mlp(p["mlp"], h)


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
    x = ops.layer_norm(x, params["norm"], eps=cfg.layer_norm_eps)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head) * cfg.logit_scale  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The Command-R of a config."""
    return fm.Model(
        "FmCohereForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("CohereForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
