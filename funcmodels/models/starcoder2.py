"""StarCoder2: layer norms, biases everywhere, and a sliding window in all layers.

Features: LayerNorm with bias (arXiv:1607.06450), a feed-forward layer of two matrices with GELU,
RoPE, grouped-query attention, a window (arXiv:1904.10509) where the config has one, optional
biases, tied or untied embeddings.
Paper: StarCoder 2, arXiv:2402.19173; `transformers` modeling_starcoder2.

Checked with: tiny random `transformers` models for each feature above; the sizes of starcoder2-3b,
7b and 15b.
Not supported: quantised checkpoints, dropout (that of published configs is read, and none is done),
partial rotary embeddings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.ops import einsum


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "starcoder2"
    ONLY = {
        "hidden_act": ("gelu_pytorch_tanh",),
        "mlp_type": (None, "default"),
        "norm_type": (None, "layer_norm"),
    }
    # Dropout, which is none here, and names of StarCoder 1, which nothing reads.
    READS = ("attention_dropout", "residual_dropout", "embedding_dropout", "activation_function",
             "layer_norm_epsilon", "scale_attn_weights", "attention_softmax_in_fp32",
             "scale_attention_softmax_in_fp32")  # fmt: skip

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = unless_given(lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
    max_position_embeddings: int
    norm_epsilon: float = 1e-5
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    use_bias: bool = True
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
    zeros = functools.partial(P, init="zeros")
    at = "model.layers.{layers}"
    attn, mlp = f"{at}.self_attn", f"{at}.mlp"
    q, kv = "(heads head_dim)", "(kv_heads head_dim)"

    def norm(name: str) -> dict[str, Any]:
        return {
            "weight": P("hidden", init="ones", hf=f"{name}.weight"),
            "bias": zeros("hidden", hf=f"{name}.bias"),
        }

    def attention_params() -> dict[str, Any]:
        weights = {
            "q": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: {q} hidden"),
            "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
            "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
            "o": P("hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden {q}"),
        }
        if not cfg.use_bias:
            return weights
        return weights | {
            "q_bias": zeros("heads head_dim", hf=f"{attn}.q_proj.bias: {q}"),
            "k_bias": zeros("kv_heads head_dim", hf=f"{attn}.k_proj.bias: {kv}"),
            "v_bias": zeros("kv_heads head_dim", hf=f"{attn}.v_proj.bias: {kv}"),
            "o_bias": zeros("hidden", hf=f"{attn}.o_proj.bias"),
        }

    def mlp_params() -> dict[str, Any]:
        weights = {
            "up": P("mlp hidden", hf=f"{mlp}.c_fc.weight"),
            "down": P("hidden mlp", hf=f"{mlp}.c_proj.weight"),
        }
        if not cfg.use_bias:
            return weights
        return weights | {
            "up_bias": zeros("mlp", hf=f"{mlp}.c_fc.bias"),
            "down_bias": zeros("hidden", hf=f"{mlp}.c_proj.bias"),
        }

    def layer() -> dict[str, Any]:
        return {
            "input_norm": norm(f"{at}.input_layernorm"),
            "attn": attention_params(),
            "post_norm": norm(f"{at}.post_attention_layernorm"),
            "mlp": mlp_params(),
        }

    tree = {
        "embed": P("vocab hidden", hf="model.embed_tokens.weight"),
        "layers": [layer() for _ in range(cfg.num_hidden_layers)],
        "norm": norm("model.norm"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Grouped-query self-attention within a window: (*batch, seq, hidden) -> the same."""
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
    o = ops.attention(q, k, v, window=cfg.sliding_window, segment_ids=segment_ids)
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def mlp(p: Any, x: Tensor):
    """Feed-forward with GELU, by its tanh approximation: (*batch, seq, hidden) -> the same."""
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    if "up_bias" in p:
        up = up + p["up_bias"]
    h = F.gelu(up, approximate="tanh")
    down = einsum(h, p["down"], "... f, e f -> ... e")  # (*batch, seq, hidden)
    return down + p["down_bias"] if "down_bias" in p else down


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention and feed-forward, each on the normalised stream and added to it."""
    norm = functools.partial(ops.layer_norm, eps=cfg.norm_epsilon)
    h = norm(x, p["input_norm"]["weight"], p["input_norm"]["bias"])
    x = x + attention(p["attn"], h, positions, segment_ids, cfg)
    h = norm(x, p["post_norm"]["weight"], p["post_norm"]["bias"])
    return x + mlp(p["mlp"], h)


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
    norm = params["norm"]
    x = ops.layer_norm(x, norm["weight"], norm["bias"], eps=cfg.norm_epsilon)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The StarCoder2 of a config."""
    return fm.Model(
        "FmStarcoder2ForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("Starcoder2ForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
