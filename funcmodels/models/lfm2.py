"""LFM2: short gated convolutions in most layers, attention in some.

Features: RMSNorm (arXiv:1910.07467) before each operator and each feed-forward; a causal
convolution over the last few tokens, channel by channel, between two gates; grouped-query attention
(arXiv:2305.13245) with QK norm over head_dim and RoPE (arXiv:2104.09864); SwiGLU
(arXiv:2002.05202), whose size is rounded as `block_*` say; tied or untied embeddings.
Paper: LFM2 technical report, arXiv:2511.23404.

The three parts of a convolution's in_proj are parameters of their own over the axis `channels`, as
is the convolution, so each rank has whole channels, and their states.

Checked with: tiny random `transformers` models for each feature above; the configs of 350M and
1.2B. Published weights were not run.
Not supported: experts (`lfm2_moe`), images, quantised checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import ConfigError
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.ops import einsum


def _layer_types(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Attention in the layers of `full_attn_idxs`, or in all without it."""
    layers = range(hf["num_hidden_layers"])
    attends = hf.get("full_attn_idxs")
    attends = layers if attends is None else attends
    return tuple("full_attention" if i in attends else "conv" for i in layers)


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "lfm2"
    LAYER_TYPES = ("full_attention", "conv")
    ONLY = {"block_use_swiglu": (True,), "use_pos_enc": (True,)}
    READS = (
        "full_attn_idxs",
        "block_ff_dim",
        "tie_embedding",
        # Second names of sizes: `plain` refuses others than the first ones say.
        "block_dim",
        "block_norm_eps",
        "conv_dim",
        "conv_dim_out",
        "num_heads",
        # Of training's first step.
        "block_mlp_init_scale",
        "block_out_init_scale",
        "block_use_xavier_init",
        "conv_use_xavier_init",
    )

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    norm_eps: float = 1e-5
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    layer_types: tuple[str, ...] = unless_given(_layer_types)
    conv_bias: bool = False
    conv_L_cache: int = 3  # noqa: N815 (as config.json spells it)
    block_multiple_of: int = 256
    block_ffn_dim_multiplier: float = 1.0
    block_auto_adjust_ff_dim: bool = True
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        """What the feed-forward's size is adjusted to."""
        if not self.block_auto_adjust_ff_dim:
            return self.intermediate_size
        size = int(self.block_ffn_dim_multiplier * int(2 * self.intermediate_size / 3))
        return self.block_multiple_of * -(-size // self.block_multiple_of)

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the names that transformers has for fields of older configs.

        Raises:
            ConfigError: a second name of a size that says another one.
        """
        for name, first in {
            "block_dim": "hidden_size",
            "conv_dim": "hidden_size",
            "conv_dim_out": "hidden_size",
            "num_heads": "num_attention_heads",
            "block_norm_eps": "norm_eps",
        }.items():
            if hf.get(name) is not None and hf.get(first, hf[name]) != hf[name]:
                raise ConfigError(
                    f"two values of {first}",
                    got=f"{first}={hf[first]}, {name}={hf[name]}",
                    need="one value; transformers looks at the first alone",
                    fix=f"{name}={hf[first]}",
                )
        found = {"rope_theta": 1e6, **hf} if not hf.get("rope_parameters") else dict(hf)
        for old, new in (
            ("block_ff_dim", "intermediate_size"),
            ("tie_embedding", "tie_word_embeddings"),
        ):
            if found.get(old) is not None:
                found[new] = found[old]
        return found


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of an LFM2, with their axes and the names of its checkpoints."""
    n = cfg.hidden_size
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=n,
        heads=cfg.num_attention_heads,
        kv_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        channels=n,
        width=cfg.conv_L_cache,
        mlp=cfg.mlp_size,
    )
    at = "model.layers.{layers}"
    attn, conv, mlp = f"{at}.self_attn", f"{at}.conv", f"{at}.feed_forward"
    kv = "(kv_heads head_dim)"
    # Rows of in_proj: all that gates what goes in, all that gates what comes out, all of x.
    thirds = {name: f"channels[{i * n}:{(i + 1) * n}/{3 * n}]" for i, name in enumerate("bcx")}

    def attention_params() -> dict[str, Any]:
        return {
            "q": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: (heads head_dim) hidden"),
            "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
            "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
            "o": P("hidden heads head_dim", hf=f"{attn}.out_proj.weight: hidden (heads head_dim)"),
            "q_norm": P("head_dim", init="ones", hf=f"{attn}.q_layernorm.weight"),
            "k_norm": P("head_dim", init="ones", hf=f"{attn}.k_layernorm.weight"),
        }

    def conv_params() -> dict[str, Any]:
        into = f"{conv}.in_proj"
        weights = {
            name: P("channels hidden", hf=f"{into}.weight: {rows} hidden")
            for name, rows in thirds.items()
        } | {
            "conv": P("channels width", hf=f"{conv}.conv.weight: channels 1 width"),
            "out": P("hidden channels", hf=f"{conv}.out_proj.weight"),
        }
        if not cfg.conv_bias:
            return weights
        zeros = functools.partial(P, init="zeros")
        return (
            weights
            | {
                f"{name}_bias": zeros("channels", hf=f"{into}.bias: {rows}")
                for name, rows in thirds.items()
            }
            | {
                "conv_bias": zeros("channels", hf=f"{conv}.conv.bias"),
                "out_bias": zeros("hidden", hf=f"{conv}.out_proj.bias"),
            }
        )

    def layer(kind: str) -> dict[str, Any]:
        operator = {"conv": conv_params()} if kind == "conv" else {"attn": attention_params()}
        return {
            "operator_norm": P("hidden", init="ones", hf=f"{at}.operator_norm.weight"),
            **operator,
            "ffn_norm": P("hidden", init="ones", hf=f"{at}.ffn_norm.weight"),
            "mlp": {
                "gate": P("mlp hidden", hf=f"{mlp}.w1.weight"),
                "up": P("mlp hidden", hf=f"{mlp}.w3.weight"),
                "down": P("hidden mlp", hf=f"{mlp}.w2.weight"),
            },
        }

    tree = {
        "embed": P("vocab hidden", hf="model.embed_tokens.weight"),
        "layers": [layer(kind) for kind in cfg.layer_types],
        "norm": P("hidden", init="ones", hf="model.embedding_norm.weight"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Grouped-query attention of normalised, rotated heads: (*batch, seq, hidden) -> the same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    q = ops.rms_norm(q, p["q_norm"], eps=cfg.norm_eps)
    k = ops.rms_norm(k, p["k_norm"], eps=cfg.norm_eps)
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        max_position=cfg.max_position_embeddings,
    )
    o = ops.attention(q, k, v, segment_ids=segment_ids)
    return einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)


@fm.block
def convolution(p: Any, x: Tensor, segment_ids: Tensor | None):
    """A short convolution between two gates: (*batch, seq, hidden) -> the same."""
    b, c, x = (einsum(x, p[name], "... e, c e -> ... c") for name in "bcx")  # (.., channels)
    if "b_bias" in p:
        b, c, x = b + p["b_bias"], c + p["c_bias"], x + p["x_bias"]
    y = ops.short_conv(b * x, p["conv"], p.get("conv_bias"), segment_ids=segment_ids)
    out = einsum(c * y, p["out"], "... c, e c -> ... e")  # (*batch, seq, hidden)
    return out + p["out_bias"] if "out_bias" in p else out


@fm.block
def mlp(p: Any, x: Tensor):
    """SwiGLU feed-forward: (*batch, seq, hidden) -> the same."""
    gate = einsum(x, p["gate"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    return einsum(ops.swiglu(gate, up), p["down"], "... f, e f -> ... e")  # (*batch, seq, hidden)


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Convolution or attention, and feed-forward: each on the normalised stream, added to it."""
    h = ops.rms_norm(x, p["operator_norm"], eps=cfg.norm_eps)
    if "conv" in p:
        x = x + convolution(p["conv"], h, segment_ids)
    else:
        x = x + attention(p["attn"], h, positions, segment_ids, cfg)
    return x + mlp(p["mlp"], ops.rms_norm(x, p["ffn_norm"], eps=cfg.norm_eps))


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
    x = ops.rms_norm(x, params["norm"], eps=cfg.norm_eps)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The LFM2 of a config."""
    sharding: dict[str, str | None] = {"vocab": "tp", "mlp": "tp"}
    if "full_attention" in cfg.layer_types:
        sharding |= {"heads": "tp", "kv_heads": "tp"}
    if "conv" in cfg.layer_types:
        sharding |= {"channels": "tp"}
    return fm.Model(
        "FmLfm2ForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding=sharding,
        hf_config=cfg.to_hf(),
        hf_architectures=("Lfm2ForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
