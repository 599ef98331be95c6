"""SmolLM3: a Llama in which every fourth layer has no rotary embedding.

Features: NoPE layers (arXiv:2501.18795: queries and keys without positions), RoPE with any scaling
elsewhere, grouped-query attention, RMSNorm before each half, SwiGLU, optional biases, and, where
the config asks for it, a sliding window in the layers that `layer_types` names.
Source: huggingface.co/blog/smollm3; `transformers` modeling_smollm3.

Checked with: tiny random `transformers` models for each feature above; the sizes of SmolLM3-3B.
Not supported: quantised checkpoints, attention dropout, partial rotary embeddings.
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


def _no_rope_layers(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """1 where a layer rotates, 0 in each last one of an interval, by default of four."""
    interval = hf.get("no_rope_layer_interval") or 4
    return tuple(int((i + 1) % interval != 0) for i in range(hf["num_hidden_layers"]))


def _layer_types(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """A window, where there is one, is that of the layers without rotary embedding."""
    rotates = hf.get("no_rope_layers") or _no_rope_layers(hf)
    has_window = hf.get("use_sliding_window") and hf.get("sliding_window") is not None
    names = ("sliding_attention" if has_window else "full_attention", "full_attention")
    return tuple(names[bool(r)] for r in rotates[: hf["num_hidden_layers"]])


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling; `no_rope_layers` is 0 where nothing turns."""

    MODEL_TYPE = "smollm3"
    ONLY = {
        "hidden_act": ("silu",),
        "pretraining_tp": (1, 2),  # changes the order of summation only
        "attention_dropout": (0, 0.0),
    }
    READS = ("no_rope_layer_interval", "max_window_layers")  # the second says nothing here

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 4
    head_dim: int = unless_given(lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    no_rope_layers: tuple[int, ...] = unless_given(_no_rope_layers)
    use_sliding_window: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = unless_given(_layer_types)
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.no_rope_layers) < self.num_hidden_layers:
            raise ConfigError(
                "no_rope_layers does not reach the last layer",
                got=f"{len(self.no_rope_layers)} entries for {self.num_hidden_layers} layers",
                need="1 or 0 for each layer",
                fix=f"add {self.num_hidden_layers - len(self.no_rope_layers)} more",
            )

    def window(self, layer: int) -> int | None:
        """The window of a layer, None for all tokens."""
        is_windowed = self.use_sliding_window and self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if is_windowed else None


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
    kv = "(kv_heads head_dim)"

    def attention_params() -> dict[str, Any]:
        weights = {
            "q": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: (heads head_dim) hidden"),
            "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
            "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
            "o": P("hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden (heads head_dim)"),
        }
        if not cfg.attention_bias:
            return weights
        zeros = functools.partial(P, init="zeros")
        return weights | {
            "q_bias": zeros("heads head_dim", hf=f"{attn}.q_proj.bias: (heads head_dim)"),
            "k_bias": zeros("kv_heads head_dim", hf=f"{attn}.k_proj.bias: {kv}"),
            "v_bias": zeros("kv_heads head_dim", hf=f"{attn}.v_proj.bias: {kv}"),
            "o_bias": zeros("hidden", hf=f"{attn}.o_proj.bias"),
        }

    def mlp_params() -> dict[str, Any]:
        weights = {
            "gate": P("mlp hidden", hf=f"{mlp}.gate_proj.weight"),
            "up": P("mlp hidden", hf=f"{mlp}.up_proj.weight"),
            "down": P("hidden mlp", hf=f"{mlp}.down_proj.weight"),
        }
        if not cfg.mlp_bias:
            return weights
        return weights | {
            "gate_bias": P("mlp", init="zeros", hf=f"{mlp}.gate_proj.bias"),
            "up_bias": P("mlp", init="zeros", hf=f"{mlp}.up_proj.bias"),
            "down_bias": P("hidden", init="zeros", hf=f"{mlp}.down_proj.bias"),
        }

    def layer() -> dict[str, Any]:
        return {
            "input_norm": P("hidden", init="ones", hf=f"{at}.input_layernorm.weight"),
            "attn": attention_params(),
            "post_norm": P("hidden", init="ones", hf=f"{at}.post_attention_layernorm.weight"),
            "mlp": mlp_params(),
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
    cfg: Config,
    rotates: bool,
    window: int | None,
):
    """Grouped-query self-attention, with rotary embedding or without any positions."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    if "q_bias" in p:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    if rotates:
        q, k = ops.rope(
            q,
            k,
            positions,
            theta=cfg.rope_theta,
            scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
            max_position=cfg.max_position_embeddings,
        )
    o = ops.attention(q, k, v, window=window, segment_ids=segment_ids)
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def mlp(p: Any, x: Tensor):
    """SwiGLU feed-forward: (*batch, seq, hidden) -> the same."""
    gate = einsum(x, p["gate"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    if "gate_bias" in p:
        gate, up = gate + p["gate_bias"], up + p["up_bias"]
    down = einsum(ops.swiglu(gate, up), p["down"], "... f, e f -> ... e")  # (*batch, seq, hidden)
    return down + p["down_bias"] if "down_bias" in p else down


@fm.block
def decoder_layer(
    p: Any,
    x: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None,
    cfg: Config,
    rotates: bool,
    window: int | None,
):
    """Attention and feed-forward, each on the normalised stream and added to it."""
    h = ops.rms_norm(x, p["input_norm"], eps=cfg.rms_norm_eps)
    x = x + attention(p["attn"], h, positions, segment_ids, cfg, rotates, window)
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
    for i, p in enumerate(params["layers"]):
        rotates = bool(cfg.no_rope_layers[i])
        x = decoder_layer(p, x, positions, segment_ids, cfg, rotates, cfg.window(i))
    x = ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The SmolLM3 of a config."""
    return fm.Model(
        "FmSmolLM3ForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("SmolLM3ForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
