"""Falcon: parallel blocks and one key-value head, or the new architecture with groups of heads.

Features: attention and feed-forward side by side on one layer norm (7B), or on two (40B), or one
after the other (RW-1B); multi-query attention (arXiv:1911.02150), grouped-query attention, or
multi-head; RoPE or ALiBi (arXiv:2108.12409); GELU; optional biases. Checkpoints hold queries, keys
and values in one matrix: those of each key-value head, then its key and its value.
Paper: Falcon, arXiv:2311.16867; `transformers` modeling_falcon.

Checked with: tiny random `transformers` models for each feature above; the sizes of Falcon-7B, 40B,
11B and RW-1B.
Not supported: quantised checkpoints, dropout. ALiBi's biases are exact here and in vLLM, where
`transformers` rounds them to bfloat16: from position 257 on they differ from it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import ConfigError
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.ops import einsum


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "falcon"
    ONLY = {
        "activation": ("gelu",),
        "attention_dropout": (0, 0.0),
        "hidden_dropout": (0, 0.0),
        "apply_residual_connection_post_layernorm": (False,),
    }

    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int = unless_given(lambda hf: 4 * hf["hidden_size"])
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int = unless_given(lambda hf: hf["num_attention_heads"])
    num_ln_in_parallel_attn: int | None = None
    max_position_embeddings: int = 2048
    layer_norm_epsilon: float = 1e-5
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                "the heads do not divide the hidden size, or the key-value heads them",
                got=f"hidden_size={self.hidden_size}, heads={self.num_attention_heads}, "
                f"key-value heads={self.kv_heads}",
                need="hidden_size a multiple of the heads, and these of the key-value heads",
                fix=f"num_kv_heads={self.num_attention_heads}",
            )
        if self.new_decoder_architecture and not self.parallel_attn:
            raise ConfigError(
                "the new architecture is parallel",
                got="new_decoder_architecture=True, parallel_attn=False",
                need="norms of parallel blocks: no published model has others",
                fix="parallel_attn=True",
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, which three fields say together."""
        if self.new_decoder_architecture:
            return self.num_kv_heads
        return 1 if self.multi_query else self.num_attention_heads

    @property
    def is_parallel(self) -> bool:
        return self.new_decoder_architecture or self.parallel_attn

    @property
    def has_two_norms(self) -> bool:
        """Whether each half of a parallel block has a norm of its own."""
        return self.new_decoder_architecture and self.num_ln_in_parallel_attn in (None, 2)

    @property
    def alibi_slopes(self) -> tuple[float, ...] | None:
        """Per head, and scaled as the scores are: powers of 2**(-8 / heads), with more between."""
        if not self.alibi:
            return None
        heads = self.num_attention_heads
        whole = 2 ** math.floor(math.log2(heads))
        slopes = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
        slopes += [2 ** (-4 * i / whole) for i in range(1, 2 * (heads - whole) + 1, 2)]
        return tuple(slope * self.head_dim**-0.5 for slope in slopes)


def params(cfg: Config) -> dict[str, Any]:
    """The parameters, with their axes and the names of Hugging Face's checkpoints."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        kv_heads=cfg.kv_heads,
        head_dim=cfg.head_dim,
        mlp=cfg.ffn_hidden_size,
    )
    zeros = functools.partial(P, init="zeros")
    at = "transformer.h.{layers}"
    attn, mlp = f"{at}.self_attention", f"{at}.mlp"
    # Of every group + 2 heads of rows, the first are queries, then come a key and a value.
    g = cfg.num_attention_heads // cfg.kv_heads
    rows = {
        "q": ("heads", f"(heads[0:{g}/{g + 2}] head_dim)"),
        "k": ("kv_heads", f"(kv_heads[{g}:{g + 1}/{g + 2}] head_dim)"),
        "v": ("kv_heads", f"(kv_heads[{g + 1}:{g + 2}/{g + 2}] head_dim)"),
    }

    def norm(name: str) -> dict[str, Any]:
        return {
            "weight": P("hidden", init="ones", hf=f"{name}.weight"),
            "bias": zeros("hidden", hf=f"{name}.bias"),
        }

    def attention_params() -> dict[str, Any]:
        weights: dict[str, Any] = {
            "o": P("hidden heads head_dim", hf=f"{attn}.dense.weight: hidden (heads head_dim)"),
        }
        for name, (axis, layout) in rows.items():
            qkv = f"{attn}.query_key_value"
            weights[name] = P(f"{axis} head_dim hidden", hf=f"{qkv}.weight: {layout} hidden")
            if cfg.bias:
                weights[f"{name}_bias"] = zeros(f"{axis} head_dim", hf=f"{qkv}.bias: {layout}")
        return weights | ({"o_bias": zeros("hidden", hf=f"{attn}.dense.bias")} if cfg.bias else {})

    def mlp_params() -> dict[str, Any]:
        weights = {
            "up": P("mlp hidden", hf=f"{mlp}.dense_h_to_4h.weight"),
            "down": P("hidden mlp", hf=f"{mlp}.dense_4h_to_h.weight"),
        }
        if not cfg.bias:
            return weights
        return weights | {
            "up_bias": zeros("mlp", hf=f"{mlp}.dense_h_to_4h.bias"),
            "down_bias": zeros("hidden", hf=f"{mlp}.dense_4h_to_h.bias"),
        }

    def layer() -> dict[str, Any]:
        tree = {"attn": attention_params(), "mlp": mlp_params()}
        if cfg.has_two_norms:
            return tree | {"attn_norm": norm(f"{at}.ln_attn"), "mlp_norm": norm(f"{at}.ln_mlp")}
        tree["attn_norm"] = norm(f"{at}.input_layernorm")
        if not cfg.is_parallel:
            tree["mlp_norm"] = norm(f"{at}.post_attention_layernorm")
        return tree

    tree = {
        "embed": P("vocab hidden", hf="transformer.word_embeddings.weight"),
        "layers": [layer() for _ in range(cfg.num_hidden_layers)],
        "norm": norm("transformer.ln_f"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Self-attention with rotary embeddings, or with a bias by distance: hidden -> hidden."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    if "q_bias" in p:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    if not cfg.alibi:
        q, k = ops.rope(
            q,
            k,
            positions,
            theta=cfg.rope_theta,
            scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
            max_position=cfg.max_position_embeddings,
        )
    o = ops.attention(q, k, v, alibi_slopes=cfg.alibi_slopes, segment_ids=segment_ids)
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def mlp(p: Any, x: Tensor):
    """Feed-forward with GELU: (*batch, seq, hidden) -> the same."""
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    h = F.gelu(up + p["up_bias"] if "up_bias" in p else up)
    down = einsum(h, p["down"], "... f, e f -> ... e")  # (*batch, seq, hidden)
    return down + p["down_bias"] if "down_bias" in p else down


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention and feed-forward, side by side on the stream, or one after the other."""
    norm = functools.partial(ops.layer_norm, eps=cfg.layer_norm_epsilon)
    h = norm(x, p["attn_norm"]["weight"], p["attn_norm"]["bias"])
    attended = x + attention(p["attn"], h, positions, segment_ids, cfg)
    if "mlp_norm" in p:
        beside = x if cfg.is_parallel else attended
        h = norm(beside, p["mlp_norm"]["weight"], p["mlp_norm"]["bias"])
    return attended + mlp(p["mlp"], h)


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
    x = ops.layer_norm(x, norm["weight"], norm["bias"], eps=cfg.layer_norm_epsilon)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The Falcon of a config."""
    return fm.Model(
        "FmFalconForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("FalconForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
