"""One axis of two sizes, a parameter nobody reads, constants, padding, no norm at the end."""

import pytest
import torch
import torch.nn.functional as F
from einops import einsum

import funcmodels as fm
from funcmodels import ops
from tests.engine.tiny import check, expected, saved, serve_model

P = fm.axes(vocab=256, hidden=128, heads=4, head_dim=32, mlp=256)
N = fm.axes(hidden=128, mlp=192)  # the narrow one of two feed-forwards


@fm.block
def layer(p, x, positions, segment_ids):
    h = ops.rms_norm(x, p["norm"], eps=1e-5)
    q, k, v = (einsum(h, p[name], "... e, h d e -> ... h d") for name in "qkv")
    q, k = ops.rope(q, k, positions, theta=1e4)
    q = q * (1.0 + torch.arange(32, device=x.device) / 32).to(x.dtype)
    o = ops.attention(q, k, v, segment_ids=segment_ids)
    x = x + einsum(o, p["o"], "... h d, e h d -> ... e")
    wide = torch.tanh(x @ p["wide"].T) * p["wide_gain"]
    narrow = torch.relu(x @ p["narrow"].T) * p["narrow_gain"]
    shifted = F.pad(x, (1, 0))[..., :-1] * torch.full((), 0.1)
    return x + wide @ p["wide_down"].T + narrow @ p["narrow_down"].T + shifted


def forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["table"])
    for p in params["layers"]:
        x = layer(p, x, positions, segment_ids)
    return ops.unembed(x, params["out"])


LAYER = {
    "norm": P("hidden", init="ones"),
    "unused": P("mlp hidden"),
    **{name: P("heads head_dim hidden") for name in "qkv"},
    "o": P("hidden heads head_dim"),
    "wide": P("mlp hidden"),
    "wide_gain": P("mlp", init="ones"),
    "wide_down": P("hidden mlp"),
    "narrow": N("mlp hidden"),
    "narrow_gain": N("mlp", init="ones"),
    "narrow_down": N("hidden mlp"),
}
MODEL = fm.Model(
    "UnevenForCausalLM",
    config={"max_position_embeddings": 256},
    params={"table": P("vocab hidden"), "layers": [LAYER] * 2, "out": P("vocab hidden")},
    forward=forward,
    sharding={"vocab": "tp", "heads": "tp", "mlp": "tp"},
)


@pytest.mark.parametrize(("tp", "compiled"), [(1, False), (2, False), (1, "trace")])
def test_equals_the_pure_function(tp, compiled, tmp_path):
    weights = saved(MODEL, tmp_path, scale=0.8)  # no last norm keeps the logits small
    check(serve_model(MODEL, tmp_path, tp=tp, compiled=compiled), expected(MODEL, weights))
