"""Latent attention as source text: a layer that is handed the linear it multiplies with."""

from __future__ import annotations

import math

from torch import fx

from compiler import layers
from compiler.emit.layers import (
    Layer,
    _check_dtype,
    builds,
    local_heads,
    numbered_prefix,
    refuse_segments,
)
from compiler.emit.scope import Scope
from compiler.emit.text import kwargs
from compiler.ir import tensor_type


@builds(layers.latent_attention)
def _latent_attention(scope: Scope, node: fx.Node, attr: str) -> Layer:
    refuse_segments(node)
    q_nope, q_rope, latent, k_rope, kv = node.args
    heads, nope = tensor_type(q_nope).shape[1:]  # type: ignore[arg-type]
    rope, rank = tensor_type(q_rope).shape[2], tensor_type(latent).shape[1]  # type: ignore[arg-type]
    features = tensor_type(node).shape[1]
    assert isinstance(heads, int) and isinstance(nope, int) and isinstance(rope, int)
    assert isinstance(features, int)
    scale = node.kwargs.get("scale")
    default = (nope + rope) ** -0.5
    if scale is None or math.isclose(scale, default, rel_tol=1e-12):  # type: ignore[arg-type]
        scale = f"{nope + rope}**-0.5"
    settings: dict[str, str | None] = {
        "kv_b_proj": f"self.{scope.placed.layers[kv]}",  # type: ignore[index]
        "num_heads": local_heads(scope, q_nope, heads),
        "qk_nope_head_dim": str(nope),
        "qk_rope_head_dim": str(rope),
        "v_head_dim": str(features // heads),
        "kv_lora_rank": str(rank),
        "scale": str(scale),
        "vllm_config": "vllm_config",
        "prefix": numbered_prefix(scope, attr),
    }
    call = f"{{}}({', '.join(scope.value(a) for a in (q_nope, q_rope, latent, k_rope))})"
    full = f"{scope.module.help('check_full_attention')}(vllm_config)"
    checks = [full, *_check_dtype(scope, q_nope)]
    return Layer(scope.module.help("LatentAttention"), kwargs(settings), call, checks=checks)
