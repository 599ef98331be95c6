"""Models that make one vector of a sequence: causal and not, embedding and classifying."""

from __future__ import annotations

from typing import Any, Literal

from einops import einsum

import funcmodels as fm
from funcmodels import ops

LABELS = 5


def pooler(
    name: str,
    *,
    task: Literal["generate", "embed", "classify"] = "embed",
    pooling: Literal["last", "mean", "cls"] | None = "last",
    causal: str = "all",  # or "none", or "some": every second layer
    window: int | None = None,
    has_sinks: bool = False,
    has_alibi: bool = False,
    softcap: float | None = None,
    labels: int = LABELS,
    labels_axis: str = "labels",
    normalize: bool = True,
) -> fm.Model:
    """A small model with rotary attention, of two layers."""
    P = fm.axes(
        vocab=256, hidden=128, heads=4, kv_heads=2, head_dim=32, mlp=256, labels=labels, one=1
    )

    def layer() -> dict[str, Any]:
        found = {
            "norm": P("hidden", init="ones"),
            "q": P("heads head_dim hidden"),
            "k": P("kv_heads head_dim hidden"),
            "v": P("kv_heads head_dim hidden"),
            "o": P("hidden heads head_dim"),
            "mlp_norm": P("hidden", init="ones"),
            "gate": P("mlp hidden"),
            "up": P("mlp hidden"),
            "down": P("hidden mlp"),
        }
        return found | ({"sinks": P("heads", init="zeros")} if has_sinks else {})

    @fm.block
    def block(p, x, positions, segment_ids, is_causal):
        h = ops.rms_norm(x, p["norm"], eps=1e-6)
        q = einsum(h, p["q"], "... e, h d e -> ... h d")
        k = einsum(h, p["k"], "... e, h d e -> ... h d")
        v = einsum(h, p["v"], "... e, h d e -> ... h d")
        q, k = ops.rope(q, k, positions, theta=10_000.0)
        o = ops.attention(
            q,
            k,
            v,
            causal=is_causal,
            window=window,
            softcap=softcap,
            sinks=p["sinks"] if has_sinks else None,
            alibi_slopes=(0.5, 0.25, 0.125, 0.0625) if has_alibi else None,
            segment_ids=segment_ids,
        )
        x = x + einsum(o, p["o"], "... h d, e h d -> ... e")
        h = ops.rms_norm(x, p["mlp_norm"], eps=1e-6)
        gate = einsum(h, p["gate"], "... e, f e -> ... f")
        up = einsum(h, p["up"], "... e, f e -> ... f")
        return x + einsum(ops.swiglu(gate, up), p["down"], "... f, e f -> ... e")

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for i, p in enumerate(params["layers"]):
            is_causal = {"all": True, "none": False, "some": i % 2 == 0}[causal]
            x = block(p, x, positions, segment_ids, is_causal)
        x = ops.rms_norm(x, params["norm"], eps=1e-6)
        if task == "embed":
            return x
        if task == "generate":
            return ops.unembed(x, params["embed"])
        return ops.unembed(x, params["score"])

    params = {
        "embed": P("vocab hidden"),
        "layers": [layer() for _ in range(2)],
        "norm": P("hidden", init="ones"),
    }
    if task == "classify":
        params["score"] = P(f"{labels_axis} hidden")
    cut = ["vocab", "heads", "kv_heads", "mlp", *(["labels"] if labels % 2 == 0 else [])]
    return fm.Model(
        name,
        config={"max_position_embeddings": 256},
        params=params,
        forward=forward,
        sharding=dict.fromkeys(cut, "tp"),
        task=task,
        pooling=pooling,
        normalize=normalize,
    )
