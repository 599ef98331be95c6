"""GPT-NeoX and Pythia: attention and feed-forward side by side, each with a layer norm of its own.

Features: parallel residuals (arXiv:2204.06745), or one after the other; RoPE on the first part of
each head's features; LayerNorm and biases, a feed-forward layer with GELU, multi-head attention.
Checkpoints hold queries, keys and values in one matrix, in turns, head by head.
Papers: GPT-NeoX-20B, arXiv:2204.06745; Pythia, arXiv:2304.01373; `transformers` modeling_gpt_neox.

Checked with: tiny random `transformers` models for each feature above; the sizes of Pythia.
Not supported: quantised checkpoints, dropout (that of published configs is read, and none is done).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import ConfigError
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling
from funcmodels.ops import einsum

# The `approximate` of F.gelu under Hugging Face's names.
GELU = {"gelu": "none", "gelu_fast": "tanh", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling of rotary embeddings in transformers 5."""

    MODEL_TYPE = "gpt_neox"
    ONLY = {"is_decoder": (None, False, True)}
    # Dropout, which is none here.
    READS = ("attention_dropout", "hidden_dropout", "classifier_dropout",
             "attention_probs_dropout_prob", "hidden_dropout_prob")  # fmt: skip

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 0.25
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                "the hidden size is not divided by the heads",
                got=f"hidden_size={self.hidden_size}, heads={self.num_attention_heads}",
                need="num_attention_heads divides hidden_size",
                fix=f"hidden_size={self.head_dim * self.num_attention_heads}",
            )
        if self.hidden_act not in GELU:
            raise ConfigError(
                "models.gpt_neox does not support this hidden_act",
                got=f"hidden_act={self.hidden_act!r}",
                need=" or ".join(GELU),
                fix="write a model file that handles it: start from a copy of "
                "funcmodels/models/gpt_neox.py",
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """With today's names for the share of rotated features, and for the base."""
        new = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
        return {new.get(key, key): value for key, value in hf.items()}


def params(cfg: Config) -> dict[str, Any]:
    """The parameters, with their axes and the names of Hugging Face's checkpoints."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        head_dim=cfg.head_dim,
        mlp=cfg.intermediate_size,
    )
    zeros = functools.partial(P, init="zeros")
    at = "gpt_neox.layers.{layers}"
    attn, mlp = f"{at}.attention", f"{at}.mlp"

    def norm(name: str) -> dict[str, Any]:
        return {
            "weight": P("hidden", init="ones", hf=f"{name}.weight"),
            "bias": zeros("hidden", hf=f"{name}.bias"),
        }

    def attention_params() -> dict[str, Any]:
        weights: dict[str, Any] = {
            "o": P("hidden heads head_dim", hf=f"{attn}.dense.weight: hidden (heads head_dim)"),
        }
        if cfg.attention_bias:
            weights["o_bias"] = zeros("hidden", hf=f"{attn}.dense.bias")
        for i, name in enumerate("qkv"):  # of every three heads of rows, one is a query's
            rows, qkv = f"(heads[{i}:{i + 1}/3] head_dim)", f"{attn}.query_key_value"
            weights[name] = P("heads head_dim hidden", hf=f"{qkv}.weight: {rows} hidden")
            if cfg.attention_bias:
                weights[f"{name}_bias"] = zeros("heads head_dim", hf=f"{qkv}.bias: {rows}")
        return weights

    def layer() -> dict[str, Any]:
        return {
            "input_norm": norm(f"{at}.input_layernorm"),
            "attn": attention_params(),
            "post_norm": norm(f"{at}.post_attention_layernorm"),
            "mlp": {
                "up": P("mlp hidden", hf=f"{mlp}.dense_h_to_4h.weight"),
                "up_bias": zeros("mlp", hf=f"{mlp}.dense_h_to_4h.bias"),
                "down": P("hidden mlp", hf=f"{mlp}.dense_4h_to_h.weight"),
                "down_bias": zeros("hidden", hf=f"{mlp}.dense_4h_to_h.bias"),
            },
        }

    tree = {
        "embed": P("vocab hidden", hf="gpt_neox.embed_in.weight"),
        "layers": [layer() for _ in range(cfg.num_hidden_layers)],
        "norm": norm("gpt_neox.final_layer_norm"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="embed_out.weight")
    return tree


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Multi-head self-attention, partly rotated: (*batch, seq, hidden) -> the same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    if "q_bias" in p:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        rotary_dim=int(cfg.head_dim * cfg.partial_rotary_factor),
        max_position=cfg.max_position_embeddings,
    )
    o = ops.attention(q, k, v, segment_ids=segment_ids)  # (*batch, seq, heads, head_dim)
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def mlp(p: Any, x: Tensor, approximate: str):
    """Feed-forward with GELU: (*batch, seq, hidden) -> the same."""
    up = einsum(x, p["up"], "... e, f e -> ... f") + p["up_bias"]  # (*batch, seq, mlp)
    h = F.gelu(up, approximate=approximate)
    return einsum(h, p["down"], "... f, e f -> ... e") + p["down_bias"]  # (*batch, seq, hidden)


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention and feed-forward, side by side on the stream, or one after the other."""
    norm = functools.partial(ops.layer_norm, eps=cfg.layer_norm_eps)
    h = norm(x, p["input_norm"]["weight"], p["input_norm"]["bias"])
    attended = x + attention(p["attn"], h, positions, segment_ids, cfg)
    beside = x if cfg.use_parallel_residual else attended
    h = norm(beside, p["post_norm"]["weight"], p["post_norm"]["bias"])
    return attended + mlp(p["mlp"], h, GELU[cfg.hidden_act])


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
    x = ops.layer_norm(x, norm["weight"], norm["bias"], eps=cfg.layer_norm_eps)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The GPT-NeoX of a config."""
    return fm.Model(
        "FmGPTNeoXForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("GPTNeoXForCausalLM",),
        hf_ignored=(  # masks and frequencies, which old checkpoints hold as tensors
            "gpt_neox.layers.*.attention.bias",
            "gpt_neox.layers.*.attention.masked_bias",
            "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
        ),
        hf_tied={"embed_out.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
