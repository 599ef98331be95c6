"""Gemma 3, its text model: four norms a layer, and windows in five layers of six.

Features: RMSNorm (arXiv:1910.07467) of weight - 1, before and after attention and feed-forward; QK
norm over head_dim; RoPE (arXiv:2104.09864) of one base within windows and of another, possibly
scaled, without; grouped-query attention (arXiv:2305.13245); GeGLU (arXiv:2002.05202); embeddings
scaled by sqrt(hidden_size) in the model's dtype; tied or untied embeddings; optionally a softcap of
the logits.
Paper: Gemma 3, arXiv:2503.19786.

Checked with: tiny random `transformers` models for each feature above; the configs of 270M, 1B and
27B (its text model's). Published weights were not run.
Of `Gemma3ForConditionalGeneration`, as 4B, 12B and 27B are published, the text model is read, which
computes the same without images. The tensors of the vision tower and its projector are passed over,
and `fm.save` writes a `Gemma3ForCausalLM`.
Not supported: images, attention to both sides, loading quantised checkpoints (the engine does),
attention dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.ops import einsum


def _layer_types(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Every sixth layer sees everything, or what `sliding_window_pattern` says instead of six."""
    every = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    return tuple(
        "sliding_attention" if (i + 1) % every else "full_attention"
        for i in range(hf["num_hidden_layers"])
    )


# Beside `text_config`, what is of images and of training alone.
_OF_IMAGES = ("vision_config", "mm_tokens_per_image", "image_token_index", "boi_token_index",
              "eoi_token_index")  # fmt: skip


def _text_of(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's part of a config.json, which is all of it where there are no images."""
    if "text_config" not in hf:
        return hf
    known = ("text_config", "tie_word_embeddings", *_OF_IMAGES)
    hf_config.check_fields(hf, model="models.gemma3", known=known)
    hf_config.check_values(hf, model="models.gemma3", only={"model_type": ("gemma3",)})
    tied = hf.get("tie_word_embeddings")
    return ({} if tied is None else {"tie_word_embeddings": tied}) | hf["text_config"]


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling; `rope_*` are of the layers without window."""

    MODEL_TYPE = "gemma3_text"
    ONLY = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_dropout": (0, 0.0),
        "attn_logit_softcapping": (None,),  # transformers does not read it
        "use_bidirectional_attention": (False,),
        "cache_implementation": ("hybrid",),  # of generate() in transformers
    }
    READS = ("sliding_window_pattern", "_sliding_window_pattern")

    vocab_size: int = 262_208
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1e-6
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rope_local_base_freq: float = 10_000.0
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] = unless_given(_layer_types)
    final_logit_softcapping: float | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = True

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        return super().from_hf(_text_of(hf))

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the rope of transformers 4: 5 has one dict for each type of layer."""
        ropes = hf.get("rope_parameters") or {}
        if not ropes:
            return {"rope_theta": 1_000_000.0, **hf}
        found = {key: value for key, value in hf.items() if key != "rope_parameters"}
        local = {"rope_type": "default", **(ropes.get("sliding_attention") or {})}
        found["rope_local_base_freq"] = local.pop("rope_theta", 10_000.0)
        hf_config.check_values(local, model="models.gemma3", only={"rope_type": ("default",)})
        return found | {"rope_parameters": {"rope_theta": 1e6, **(ropes["full_attention"] or {})}}

    def written(self) -> dict[str, Any]:
        own = super().written()
        local = {"rope_type": "default", "rope_theta": own.pop("rope_local_base_freq")}
        ropes = {"full_attention": own["rope_parameters"], "sliding_attention": local}
        return own | {"rope_parameters": ropes}


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a Gemma 3, with their axes and the names of Hugging Face's checkpoints."""
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
    zeros = functools.partial(P, init="zeros")  # the norms' too: they hold weight - 1

    def attention_params() -> dict[str, Any]:
        weights = {
            "q": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: (heads head_dim) hidden"),
            "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
            "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
            "o": P("hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden (heads head_dim)"),
            "q_norm": zeros("head_dim", hf=f"{attn}.q_norm.weight"),
            "k_norm": zeros("head_dim", hf=f"{attn}.k_norm.weight"),
        }
        if not cfg.attention_bias:
            return weights
        return weights | {
            "q_bias": zeros("heads head_dim", hf=f"{attn}.q_proj.bias: (heads head_dim)"),
            "k_bias": zeros("kv_heads head_dim", hf=f"{attn}.k_proj.bias: {kv}"),
            "v_bias": zeros("kv_heads head_dim", hf=f"{attn}.v_proj.bias: {kv}"),
            "o_bias": zeros("hidden", hf=f"{attn}.o_proj.bias"),
        }

    def layer() -> dict[str, Any]:
        return {
            "input_norm": zeros("hidden", hf=f"{at}.input_layernorm.weight"),
            "attn": attention_params(),
            "post_attn_norm": zeros("hidden", hf=f"{at}.post_attention_layernorm.weight"),
            "pre_mlp_norm": zeros("hidden", hf=f"{at}.pre_feedforward_layernorm.weight"),
            "mlp": {
                "gate": P("mlp hidden", hf=f"{mlp}.gate_proj.weight"),
                "up": P("mlp hidden", hf=f"{mlp}.up_proj.weight"),
                "down": P("hidden mlp", hf=f"{mlp}.down_proj.weight"),
            },
            "post_mlp_norm": zeros("hidden", hf=f"{at}.post_feedforward_layernorm.weight"),
        }

    tree = {
        "embed": P("vocab hidden", hf="model.embed_tokens.weight"),
        "layers": [layer() for _ in range(cfg.num_hidden_layers)],
        "norm": zeros("hidden", hf="model.norm.weight"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


def norm(x: Tensor, weight: Tensor, cfg: Config) -> Tensor:
    """RMSNorm whose checkpoint holds weight - 1."""
    return ops.rms_norm(x, weight, eps=cfg.rms_norm_eps, offset=1.0)


@fm.block
def attention(
    p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, layer_type: str, cfg: Config
):
    """Grouped-query attention of normalised, rotated heads: (*batch, seq, hidden) -> the same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    if "q_bias" in p:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    q, k = norm(q, p["q_norm"], cfg), norm(k, p["k_norm"], cfg)
    is_local = layer_type == "sliding_attention"
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_local_base_freq if is_local else cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling and not is_local else None,
        max_position=cfg.max_position_embeddings,
    )
    o = ops.attention(
        q,
        k,
        v,
        scale=cfg.query_pre_attn_scalar**-0.5,
        window=cfg.sliding_window if is_local else None,
        segment_ids=segment_ids,
    )
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def mlp(p: Any, x: Tensor):
    """GeGLU feed-forward: (*batch, seq, hidden) -> the same."""
    gate = einsum(x, p["gate"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    return einsum(ops.geglu(gate, up, approximate="tanh"), p["down"], "... f, e f -> ... e")


@fm.block
def decoder_layer(
    p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, layer_type: str, cfg: Config
):
    """Attention and feed-forward, each between two norms, added to the stream."""
    h = norm(x, p["input_norm"], cfg)
    h = attention(p["attn"], h, positions, segment_ids, layer_type, cfg)
    x = x + norm(h, p["post_attn_norm"], cfg)
    h = mlp(p["mlp"], norm(x, p["pre_mlp_norm"], cfg))
    return x + norm(h, p["post_mlp_norm"], cfg)


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
    # A tensor of x's dtype: bfloat16 rounds sqrt(3072) = 55.4 to 55.5, as in training.
    x = x * torch.full((), cfg.hidden_size**0.5, dtype=x.dtype, device=x.device)
    for p, layer_type in zip(params["layers"], cfg.layer_types, strict=True):
        x = decoder_layer(p, x, positions, segment_ids, layer_type, cfg)
    x = norm(x, params["norm"], cfg)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    logits = ops.unembed(x, head)  # (*batch, seq, vocab)
    if cfg.final_logit_softcapping is None:
        return logits
    return cfg.final_logit_softcapping * torch.tanh(logits / cfg.final_logit_softcapping)


def model(cfg: Config) -> fm.Model:
    """The Gemma 3 of a config."""
    return fm.Model(
        "FmGemma3ForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("Gemma3ForCausalLM",),
        hf_ignored=("vision_tower.*", "multi_modal_projector.*"),
        hf_prefix="language_model.",  # of checkpoints with images
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
