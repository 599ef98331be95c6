"""Value residuals: later layers mix their values with the first layer's; scaled, tied logits."""

import pytest
import torch
from einops import einsum

import funcmodels as fm
from funcmodels import ops
from tests.engine.tiny import check, expected, saved, serve_model

P = fm.axes(vocab=256, hidden=128, heads=4, kv_heads=2, head_dim=32, mlp=384)


def layer():
    return {
        "n1": P("hidden", init="ones"),
        "n2": P("hidden", init="ones"),
        "q": P("heads head_dim hidden"),
        "k": P("kv_heads head_dim hidden"),
        "v": P("kv_heads head_dim hidden"),
        "o": P("hidden heads head_dim"),
        "mix": P("", init="zeros"),
        "up": P("mlp hidden"),
        "down": P("hidden mlp"),
    }


@fm.block
def block(p, x, first_v, positions, segment_ids):
    h = ops.rms_norm(x, p["n1"], eps=1e-6)
    q = einsum(h, p["q"], "... e, h d e -> ... h d")
    k = einsum(h, p["k"], "... e, h d e -> ... h d")
    v = einsum(h, p["v"], "... e, h d e -> ... h d")
    if first_v is not None:
        a = torch.sigmoid(p["mix"])
        v = a * v + (1 - a) * first_v
    q, k = ops.rope(q, k, positions, theta=1e4)
    x = x + einsum(
        ops.attention(q, k, v, segment_ids=segment_ids), p["o"], "... h d, e h d -> ... e"
    )
    h = ops.rms_norm(x, p["n2"], eps=1e-6)
    return x + torch.relu(h @ p["up"].T).square() @ p["down"].T, v


def forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["embed"])
    first = None
    for p in params["layers"]:
        x, v = block(p, x, first, positions, segment_ids)
        first = v if first is None else first
    return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-6), params["embed"]) * 0.5


model = fm.Model(
    "ValResForCausalLM",
    config={"max_position_embeddings": 256},
    params={
        "embed": P("vocab hidden"),
        "layers": [layer() for _ in range(3)],
        "norm": P("hidden", init="ones"),
    },
    forward=forward,
    sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
)


@pytest.mark.parametrize(("tp", "compiled"), [(1, False), (2, False), (4, False), (1, "trace")])
def test_equals_the_pure_function(tp, compiled, tmp_path):
    weights = saved(model, tmp_path)
    check(serve_model(model, tmp_path, tp=tp, compiled=compiled), expected(model, weights))
