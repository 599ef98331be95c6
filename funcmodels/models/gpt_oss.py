"""GPT-OSS: sinks in the attention, windows in every other layer, experts with biases.

Features: RMSNorm (arXiv:1910.07467), RoPE with yarn scaling (arXiv:2309.00071), grouped-query
attention (arXiv:2305.13245) with biases, one more logit a head that takes attention and gives
nothing (sinks, arXiv:2309.17453), a window in the even layers; a router with a bias that takes the
softmax of the k largest logits alone; experts with biases and a clamped SwiGLU.
Source: gpt-oss-120b & gpt-oss-20b model card, arXiv:2508.10925.

Checked with: tiny random `transformers` models; the configs of 20B and 120B. Published weights were
not run: they are stored as MXFP4, which is not read; conversions to bfloat16 are.
Not supported: quantised checkpoints, attention dropout. The loss that balances the experts is the
training's.
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
    """Windows in the even layers."""
    kinds = ("sliding_attention", "full_attention")
    return tuple(kinds[index % 2] for index in range(hf["num_hidden_layers"]))


_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "gpt_oss"
    ONLY = {"hidden_act": ("silu",), "attention_dropout": (0, 0.0), "attention_bias": (True,)}
    # They weigh and report a loss, or say again what others say.
    READS = (
        "output_router_logits",
        "router_aux_loss_coef",
        "experts_per_token",
        "initial_context_length",
    )

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 64
    num_local_experts: int
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = 128
    layer_types: tuple[str, ...] = unless_given(_layer_types)
    tie_word_embeddings: bool = False

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """A config without a rope has that of the published models."""
        if hf.get("rope_scaling") is None and hf.get("rope_parameters") is None:
            return {"rope_theta": 150000.0, **hf, "rope_scaling": _YARN}
        return hf


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a GPT-OSS, with their axes and the names of its checkpoints."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        kv_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        mlp=cfg.intermediate_size,
        experts=cfg.num_local_experts,
    )
    at = "model.layers.{layers}"
    attn, ffn = f"{at}.self_attn", f"{at}.mlp"
    kv = "(kv_heads head_dim)"

    # Of gates and ups, which take turns in one tensor.
    gates, ups = "mlp[0:1/2]", "mlp[1:2/2]"
    zeros = functools.partial(P, init="zeros")

    def attention_params() -> dict[str, Any]:
        return {
            "q": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: (heads head_dim) hidden"),
            "q_bias": zeros("heads head_dim", hf=f"{attn}.q_proj.bias: (heads head_dim)"),
            "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
            "k_bias": zeros("kv_heads head_dim", hf=f"{attn}.k_proj.bias: {kv}"),
            "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
            "v_bias": zeros("kv_heads head_dim", hf=f"{attn}.v_proj.bias: {kv}"),
            "sinks": zeros("heads", hf=f"{attn}.sinks"),
            "o": P("hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden (heads head_dim)"),
            "o_bias": zeros("hidden", hf=f"{attn}.o_proj.bias"),
        }

    def mixture_params() -> dict[str, Any]:
        both, down = f"{ffn}.experts.gate_up_proj", f"{ffn}.experts.down_proj"
        return {
            "router": P("experts hidden", hf=f"{ffn}.router.weight"),
            "router_bias": zeros("experts", hf=f"{ffn}.router.bias"),
            "gate": P("experts mlp hidden", hf=f"{both}: experts hidden {gates}"),
            "gate_bias": zeros("experts mlp", hf=f"{both}_bias: experts {gates}"),
            "up": P("experts mlp hidden", hf=f"{both}: experts hidden {ups}"),
            "up_bias": zeros("experts mlp", hf=f"{both}_bias: experts {ups}"),
            "down": P("experts hidden mlp", hf=f"{down}: experts mlp hidden"),
            "down_bias": zeros("experts hidden", hf=f"{down}_bias"),
        }

    def layer() -> dict[str, Any]:
        return {
            "input_norm": P("hidden", init="ones", hf=f"{at}.input_layernorm.weight"),
            "attn": attention_params(),
            "post_norm": P("hidden", init="ones", hf=f"{at}.post_attention_layernorm.weight"),
            "mlp": mixture_params(),
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
    """Grouped-query attention with rotary embeddings and sinks: (*batch, seq, hidden) -> same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d") + p["q_bias"]  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d") + p["k_bias"]
    v = einsum(x, p["v"], "... e, h d e -> ... h d") + p["v_bias"]
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        max_position=cfg.max_position_embeddings,
    )
    o = ops.attention(q, k, v, window=window, sinks=p["sinks"], segment_ids=segment_ids)
    return einsum(o, p["o"], "... h d, e h d -> ... e") + p["o_bias"]  # (*batch, seq, hidden)


@fm.block
def mixture(p: Any, x: Tensor, cfg: Config):
    """Each token by its k experts: (*batch, seq, hidden) -> the same."""
    logits = einsum(x, p["router"], "... e, x e -> ... x") + p["router_bias"]
    top, ids = logits.topk(cfg.num_experts_per_tok, dim=-1)  # (*batch, seq, k)
    return ops.experts(
        x,
        top.softmax(-1),
        ids,
        p["gate"],
        p["up"],
        p["down"],
        gate_bias=p["gate_bias"],
        up_bias=p["up_bias"],
        down_bias=p["down_bias"],
        activation="swigluoai",
        alpha=cfg.swiglu_alpha,
        limit=cfg.swiglu_limit,
    )


@fm.block
def decoder_layer(
    p: Any,
    x: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None,
    window: int | None,
    cfg: Config,
):
    """Attention and experts, each on the normalised stream and added to it."""
    h = ops.rms_norm(x, p["input_norm"], eps=cfg.rms_norm_eps, rounds_once=True)
    x = x + attention(p["attn"], h, positions, segment_ids, window, cfg)
    h = ops.rms_norm(x, p["post_norm"], eps=cfg.rms_norm_eps, rounds_once=True)
    return x + mixture(p["mlp"], h, cfg)


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
    for p, layer_type in zip(params["layers"], cfg.layer_types, strict=True):
        window = cfg.sliding_window if layer_type == "sliding_attention" else None
        x = decoder_layer(p, x, positions, segment_ids, window, cfg)
    x = ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps, rounds_once=True)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The GPT-OSS of a config."""
    return fm.Model(
        "FmGptOssForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={
            "vocab": "tp",
            "heads": "tp",
            "kv_heads": "tp",
            "mlp": "tp",
            "experts": "ep",
        },
        hf_config=cfg.to_hf(),
        hf_architectures=("GptOssForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
