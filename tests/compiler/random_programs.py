"""Random small programs for hypothesis: sizes, an axis table, and steps of several kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from hypothesis import strategies as st
from torch import Tensor

import funcmodels as fm
from funcmodels import ops

AXES = ("vocab", "hidden", "heads", "kv_heads", "head_dim", "mlp", "rank")


@dataclass(frozen=True)
class Spec:
    """What a program is made from."""

    sizes: tuple[tuple[str, int], ...]
    table: tuple[str, ...]  # axes on "tp"
    steps: tuple[str, ...]
    layers: int
    tied: bool
    final_norm: bool


@st.composite
def specs(draw: Any, steps: tuple[str, ...] = ()) -> Spec:
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    sizes = {
        "vocab": draw(st.sampled_from([8, 12, 15])),
        "hidden": draw(st.sampled_from([6, 8, 12])),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 2, 3])),
        "head_dim": draw(st.sampled_from([2, 4])),
        "mlp": draw(st.sampled_from([4, 6, 12])),
        "rank": 3,
    }
    one = st.sampled_from([(), ("hidden",), ("head_dim",), ("mlp",), ("kv_heads",), ("rank",)])
    usual = st.sampled_from(
        [
            ("vocab", "heads", "kv_heads", "mlp"),
            ("heads", "kv_heads"),
            ("heads",),
            ("heads", "mlp"),
            ("vocab", "mlp"),
            ("vocab", "kv_heads"),
            ("rank", "mlp"),
        ]
    )
    return Spec(
        tuple(sizes.items()),
        draw(st.one_of(usual, usual, one)),
        tuple(draw(st.lists(st.sampled_from(steps or tuple(STEPS)), min_size=1, max_size=4))),
        draw(st.integers(1, 2)),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def model_of(spec: Spec) -> fm.Model:
    """The program of a spec."""
    P = fm.axes(**dict(spec.sizes))
    table = dict.fromkeys(spec.table, "tp")

    def params_of(step: str) -> dict[str, Any]:
        # A table may put two dims of one tensor on "tp": the second is then left whole.
        return {name: _cut_once(P, axes, table) for name, axes in STEPS[step][0].items()}

    params: dict[str, Any] = {
        "embed": _cut_once(P, "vocab hidden", table),
        "norm": P("hidden"),
        "layers": [
            {f"{i}_{step}": params_of(step) for i, step in enumerate(spec.steps)}
            for _ in range(spec.layers)
        ],
    }
    if not spec.tied:
        params["head"] = _cut_once(P, "vocab hidden", table)

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for layer in params["layers"]:
            for i, step in enumerate(spec.steps):
                x = STEPS[step][1](layer[f"{i}_{step}"], x, positions)
        if spec.final_norm:
            x = ops.rms_norm(x, params["norm"], eps=1e-5)
        return ops.unembed(x, params["embed"] if spec.tied else params["head"])

    return fm.Model("Random", None, params, forward)


def _cut_once(P: fm.Axes, axes: str, table: dict[str, str]) -> fm.Param:
    names = axes.split()
    first = next((axis for axis in names if axis in table), None)
    return P(axes, sharding=fm.PartitionSpec(*("tp" if a == first else None for a in names)))


# The steps: each a function of its parameters, an activation (*batch, hidden) and positions


def _qkv(p: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(einsum(x, p[name], "... e, h d e -> ... h d") for name in "qkv")


@fm.block
def attention(p, x, positions):
    q, k, v = _qkv(p, x)
    q, k = ops.rope(q, k, positions, theta=100.0)
    return x + einsum(ops.attention(q, k, v), p["o"], "... h d, e h d -> ... e")


@fm.block
def normed_attention(p, x, positions):
    h = ops.rms_norm(x, p["norm"], eps=1e-5)
    q, k, v = _qkv(p, h)
    q, k = ops.rms_norm(q, p["q_norm"], eps=1e-5), ops.rms_norm(k, p["k_norm"], eps=1e-5)
    o = ops.attention(q, k, v, softcap=5.0, window=3)
    return x + torch.matmul(rearrange(o, "... h d -> ... (h d)"), p["o"].flatten(1).T)


def biased_attention(p, x, positions):
    q, k, v = (y + p[f"{name}_bias"] for name, y in zip("qkv", _qkv(p, x), strict=True))
    o = ops.attention(*ops.rope(q, k, positions, theta=100.0), v, sinks=p["sinks"])
    return x + torch.einsum("...hd,ehd->...e", o, p["o"])


@fm.block
def gated(p, x, positions):
    h = ops.rms_norm(x, p["norm"], eps=1e-5)
    gate, up = einsum(h, p["gate"], "... e, f e -> ... f"), h @ p["up"].T
    return x + F.linear(ops.swiglu(gate, up), p["down"])


@fm.block
def gelu_gated(p, x, positions):
    h = F.gelu(x @ p["gate"].T, approximate="tanh") * F.linear(x, p["up"])
    return x + h @ p["down"].mT + p["bias"]


def plain_mlp(p, x, positions):
    return x + torch.relu(F.linear(x, p["gate"], p["gate_bias"])) @ p["down"].T


@fm.block
def routed(p, x, positions):
    weight = einsum(x, p["gate"], "... e, f e -> ... f").softmax(-1)
    return x + einsum(weight, torch.tanh(p["down"]), "... f, e f -> ... e")


def low_rank(p, x, positions):
    return x + (x @ p["a"].T) @ p["b"].T


@fm.block
def heads_apart(p, x, positions):
    h = einsum(x, p["q"], "... e, h d e -> ... h d")
    h = h / (1 + h.square().sum(-1, keepdim=True)) * p["scale"][:, None]
    parts = h.unbind(-1)
    return x + einsum(torch.stack(parts[::-1], -1), p["o"], "... h d, e h d -> ... e")


@fm.block
def scaled(p, x, positions):
    return x * p["scale"] + torch.where(x > 0, x, 0.1 * x).mean(-1, keepdim=True)


@fm.block
def post_norm(p, x, positions):
    return ops.rms_norm(x + ops.layer_norm(x, p["norm"], p["bias"], eps=1e-5), p["norm"], eps=1e-5)


@fm.block
def nested(p, x, positions):
    x = gated(p, x, positions)
    return gated(p, x * 0.5, positions)


QKVO = {
    "q": "heads head_dim hidden",
    "k": "kv_heads head_dim hidden",
    "v": "kv_heads head_dim hidden",
    "o": "hidden heads head_dim",
}
GATED = {"norm": "hidden", "gate": "mlp hidden", "up": "mlp hidden", "down": "hidden mlp"}
BIASES = {"q_bias": "heads head_dim", "k_bias": "kv_heads head_dim", "v_bias": "kv_heads head_dim"}

STEPS: dict[str, tuple[dict[str, str], Any]] = {
    "attention": (QKVO, attention),
    "normed_attention": (
        QKVO | {"norm": "hidden", "q_norm": "head_dim", "k_norm": "head_dim"},
        normed_attention,
    ),
    "biased_attention": (QKVO | BIASES | {"sinks": "heads"}, biased_attention),
    "gated": (GATED, gated),
    "gelu_gated": (GATED | {"bias": "hidden"}, gelu_gated),
    "plain_mlp": (GATED | {"gate_bias": "mlp"}, plain_mlp),
    "routed": (GATED, routed),
    "low_rank": ({"a": "rank hidden", "b": "hidden rank"}, low_rank),
    "heads_apart": (QKVO | {"scale": "heads"}, heads_apart),
    "scaled": ({"scale": "hidden"}, scaled),
    "post_norm": ({"norm": "hidden", "bias": "hidden"}, post_norm),
    "nested": (GATED, nested),
}
