"""A model of no published checkpoint, with everything that attention can have.

Norms and residual sums are inside two blocks; parameters are named by their paths; some are used in
plain torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

import funcmodels as fm
from funcmodels import ops

ACTIVATIONS = {
    "swiglu": ops.swiglu,
    "geglu": functools.partial(ops.geglu, approximate="none"),
    "geglu-tanh": functools.partial(ops.geglu, approximate="tanh"),
}


@dataclass(frozen=True)
class Config:
    """Sizes, and features: by default none beyond a plain decoder."""

    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    positions: str = "rope"  # or "alibi", or "learned"
    rotary_dim: int | None = None
    interleaved: bool = False
    local_window: int | None = None  # of every other layer
    softcap: float | None = None
    final_softcap: float | None = None
    attention_scale: float | None = None
    has_sinks: bool = False
    has_qk_norm: bool = False
    norms_all_heads: bool = False  # as one, not each by itself
    has_gains: bool = False
    norm_offset: float = 0.0
    activation: str = "swiglu"  # or "geglu", "geglu-tanh", or "gelu" without a gate


def params(cfg: Config) -> dict[str, Any]:
    """The parameters; those of a feature only where it is on."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        kv_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        mlp=cfg.intermediate_size,
        positions=cfg.max_position_embeddings,
        q_dim=cfg.num_attention_heads * cfg.head_dim,
        kv_dim=cfg.num_key_value_heads * cfg.head_dim,
    )

    centre = "zeros" if cfg.norm_offset else "ones"

    def layer() -> dict[str, Any]:
        attn = {
            "norm": P("hidden", init=centre),
            "q": P("heads head_dim hidden"),
            "k": P("kv_heads head_dim hidden"),
            "v": P("kv_heads head_dim hidden"),
            "o": P("hidden heads head_dim"),
        }
        if cfg.has_qk_norm:
            attn |= {"q_norm": P("head_dim", init="ones"), "k_norm": P("head_dim", init="ones")}
        if cfg.norms_all_heads:
            attn |= {"q_norm": P("q_dim", init="ones"), "k_norm": P("kv_dim", init="ones")}
        if cfg.has_sinks:
            attn["sinks"] = P("heads", init="zeros")
        if cfg.has_gains:
            attn["head_gain"] = P("heads", init="ones")
        mlp = {
            "norm": P("hidden", init=centre),
            "up": P("mlp hidden"),
            "down": P("hidden mlp"),
        }
        if cfg.activation != "gelu":
            mlp["gate"] = P("mlp hidden")
        if cfg.has_gains:
            mlp |= {"gain": P("hidden", init="ones"), "shift": P("mlp", init="zeros")}
        return {"attn": attn, "mlp": mlp}

    tree = {
        "embed": P("vocab hidden"),
        "layers": [layer() for _ in range(cfg.num_hidden_layers)],
        "norm": P("hidden", init=centre),
        "head": P("vocab hidden"),
    }
    return tree | ({"places": P("positions hidden")} if cfg.positions == "learned" else {})


@fm.block
def attention(
    p: Any,
    x: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None,
    window: int | None,
    cfg: Config,
):
    """Attention with its norm and its residual sum."""
    h = ops.rms_norm(x, p["norm"], eps=cfg.rms_norm_eps, offset=cfg.norm_offset)
    q = einsum(h, p["q"], "... e, h d e -> ... h d")
    k = einsum(h, p["k"], "... e, h d e -> ... h d")
    v = einsum(h, p["v"], "... e, h d e -> ... h d")
    if cfg.has_qk_norm:
        q = ops.rms_norm(q, p["q_norm"], eps=cfg.rms_norm_eps)
        k = ops.rms_norm(k, p["k_norm"], eps=cfg.rms_norm_eps)
    if cfg.norms_all_heads:
        q = ops.rms_norm(q.flatten(-2), p["q_norm"], eps=cfg.rms_norm_eps).view(q.shape)
        k = ops.rms_norm(k.flatten(-2), p["k_norm"], eps=cfg.rms_norm_eps).view(k.shape)
    if cfg.positions == "rope":
        q, k = ops.rope(
            q,
            k,
            positions,
            theta=cfg.rope_theta,
            rotary_dim=cfg.rotary_dim,
            interleaved=cfg.interleaved,
        )
    heads = cfg.num_attention_heads
    slopes = tuple(2 ** (-8 * (i + 1) / heads) for i in range(heads))
    o = ops.attention(
        q,
        k,
        v,
        scale=cfg.attention_scale,
        window=window,
        softcap=cfg.softcap,
        sinks=p["sinks"] if cfg.has_sinks else None,
        alibi_slopes=slopes if cfg.positions == "alibi" else None,
        segment_ids=segment_ids,
    )
    if cfg.has_gains:
        o = o * p["head_gain"][:, None]
    return x + einsum(o, p["o"], "... h d, e h d -> ... e")


@fm.block
def mlp(p: Any, x: Tensor, cfg: Config):
    """Feed-forward with its norm and its residual sum."""
    h = ops.rms_norm(x, p["norm"], eps=cfg.rms_norm_eps, offset=cfg.norm_offset)
    up = einsum(h, p["up"], "... e, f e -> ... f")
    if cfg.has_gains:
        up = up + torch.tanh(p["shift"])
    if cfg.activation == "gelu":
        inner = F.gelu(up)
    else:
        gate = einsum(h, p["gate"], "... e, f e -> ... f")
        inner = ACTIVATIONS[cfg.activation](gate, up)
    out = einsum(inner, p["down"], "... f, e f -> ... e")
    return x + (out * p["gain"] if cfg.has_gains else out)


def forward(
    params: Any,
    tokens: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    *,
    cfg: Config,
) -> Tensor:
    """Logits of tokens."""
    x = ops.embed(tokens, params["embed"])
    if cfg.positions == "learned":
        x = x + ops.embed(positions, params["places"])
    for i, p in enumerate(params["layers"]):
        window = cfg.local_window if i % 2 == 0 else None
        x = attention(p["attn"], x, positions, segment_ids, window, cfg)
        x = mlp(p["mlp"], x, cfg)
    x = ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps, offset=cfg.norm_offset)
    logits = ops.unembed(x, params["head"])
    if cfg.final_softcap is None:
        return logits
    return cfg.final_softcap * torch.tanh(logits / cfg.final_softcap)


def custom(**changes: Any) -> fm.Model:
    """The model of a config with some fields changed."""
    cfg = Config(**changes)
    return fm.Model(
        "CustomModel",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
    )
