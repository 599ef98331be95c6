"""Phi-3 and Phi-4-mini: a Llama whose checkpoints hold fused matrices, with long rotary scaling.

Features: RoPE with default or longrope (arXiv:2402.13753) scaling, on all features of a head or on
the first part of them, a sliding window in all layers where the config has one, grouped-query
attention, RMSNorm before each half, SwiGLU, tied or untied embeddings. Checkpoints hold queries,
keys and values in one matrix, and gate and up in another.
Papers: Phi-3, arXiv:2404.14219; Phi-4-mini, arXiv:2503.01743; `transformers` modeling_phi3.

Checked with: tiny random `transformers` models for each feature above; the sizes of Phi-3-mini,
Phi-3-medium and Phi-4-mini.
Not supported: loading quantised checkpoints (the engine does), dropout, rotary scalings but
longrope.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import ConfigError
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.ops import einsum

ROPE_TYPES = ("default", "longrope")


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "phi3"
    ONLY = {
        "hidden_act": ("silu",),
        "attention_dropout": (0, 0.0),
        "resid_pdrop": (0, 0.0),
        "embd_pdrop": (0, 0.0),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "lm_head_bias": (False,),
        "full_attn_mod": (None, 1),
        "interpolate_factor": (None, 1),
    }

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = unless_given(lambda hf: hf["num_attention_heads"])
    head_dim: int = unless_given(lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
    max_position_embeddings: int
    original_max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = dict(self.rope_scaling or ()).get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ConfigError(
                "models.phi3 does not support this rope_type",
                got=repr(kind),
                need=" or ".join(ROPE_TYPES),
                fix="write a model file that handles it",
            )

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the original length that transformers takes where a config says none."""
        return {"original_max_position_embeddings": 4096, **hf}

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """Also where longrope is named "su" or "yarn", as in the first of them.

        It is written as "longrope": transformers 5 does not read its old names.
        """
        return super().from_hf({key: _renamed(value) for key, value in hf.items()})


def _renamed(value: Any) -> Any:
    """A field of config.json; of a scaling, with the name that it has now."""
    if not isinstance(value, Mapping) or "long_factor" not in value:
        return value
    rope = dict(value)
    kinds = {rope.pop(key, None) for key in ("type", "rope_type")}
    return {**rope, "rope_type": "longrope"} if kinds & {"su", "yarn"} else value


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
    # Rows of the fused matrices: all queries, all keys, all values; all of gate, all of up.
    q, k = cfg.num_attention_heads, cfg.num_attention_heads + cfg.num_key_value_heads
    n, m = k + cfg.num_key_value_heads, cfg.intermediate_size
    qkv, gate_up = f"{attn}.qkv_proj.weight", f"{mlp}.gate_up_proj.weight"

    def layer() -> dict[str, Any]:
        return {
            "input_norm": P("hidden", init="ones", hf=f"{at}.input_layernorm.weight"),
            "attn": {
                "q": P("heads head_dim hidden", hf=f"{qkv}: (heads[0:{q}/{n}] head_dim) hidden"),
                "k": P(
                    "kv_heads head_dim hidden", hf=f"{qkv}: (kv_heads[{q}:{k}/{n}] head_dim) hidden"
                ),
                "v": P(
                    "kv_heads head_dim hidden", hf=f"{qkv}: (kv_heads[{k}:{n}/{n}] head_dim) hidden"
                ),
                "o": P(
                    "hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden (heads head_dim)"
                ),
            },
            "post_norm": P("hidden", init="ones", hf=f"{at}.post_attention_layernorm.weight"),
            "mlp": {
                "gate": P("mlp hidden", hf=f"{gate_up}: mlp[0:{m}/{2 * m}] hidden"),
                "up": P("mlp hidden", hf=f"{gate_up}: mlp[{m}:{2 * m}/{2 * m}] hidden"),
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
    """Grouped-query self-attention within a window: (*batch, seq, hidden) -> the same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        rotary_dim=int(cfg.head_dim * cfg.partial_rotary_factor),
        max_position=cfg.max_position_embeddings,
    )
    o = ops.attention(q, k, v, window=cfg.sliding_window, segment_ids=segment_ids)
    return einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)


@fm.block
def mlp(p: Any, x: Tensor):
    """SwiGLU feed-forward: (*batch, seq, hidden) -> the same."""
    gate = einsum(x, p["gate"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    return einsum(ops.swiglu(gate, up), p["down"], "... f, e f -> ... e")  # (*batch, seq, hidden)


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention and feed-forward, each on the normalised stream and added to it."""
    h = ops.rms_norm(x, p["input_norm"], eps=cfg.rms_norm_eps)
    x = x + attention(p["attn"], h, positions, segment_ids, cfg)
    h = ops.rms_norm(x, p["post_norm"], eps=cfg.rms_norm_eps)
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
    x = ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The Phi-3 of a config."""
    return fm.Model(
        "FmPhi3ForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("Phi3ForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
