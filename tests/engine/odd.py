"""A model that exists nowhere: what a researcher might write, with nothing told to the compiler.

Parallel attention and feed-forward, another window in every second layer, a low-rank branch behind
a scalar gate, a scale a head, a weight stored [in, out], an output projection that is rearranged in
the model, a scaled embedding and capped logits, and no checkpoint names.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange

import funcmodels as fm
from funcmodels import ops

P = fm.axes(vocab=500, hidden=128, heads=4, kv_heads=2, head_dim=32, mlp=256, rank=16)


def layer():
    return {
        "n1": P("hidden", init="ones"),
        "n2": P("hidden", init="ones"),
        "q": P("heads head_dim hidden"),
        "k": P("kv_heads head_dim hidden"),
        "v": P("kv_heads head_dim hidden"),
        "o": P("hidden heads head_dim"),
        "a": P("rank hidden"),
        "b": P("hidden rank"),
        "gain": P(""),
        "scale": P("heads", init="ones"),
        "w1": P("hidden mlp"),
        "w2": P("mlp hidden"),
    }


@fm.block
def attend(p, x, positions, segment_ids, window):
    q = einsum(x, p["q"], "... e, h d e -> ... h d") * p["scale"][:, None]
    k = einsum(x, p["k"], "... e, h d e -> ... h d")
    v = einsum(x, p["v"], "... e, h d e -> ... h d")
    q, k = ops.rope(q, k, positions, theta=1e4)
    o = ops.attention(q, k, v, window=window, segment_ids=segment_ids)
    return rearrange(o, "... h d -> ... (h d)") @ rearrange(p["o"], "e h d -> (h d) e")


@fm.block
def feed_forward(p, x):
    h = F.gelu(x @ p["w1"], approximate="tanh") @ p["w2"]
    low = (x @ p["a"].T) @ p["b"].T
    return h + low * torch.tanh(p["gain"])


def forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["embed"]) * 11.3
    for i, p in enumerate(params["layers"]):
        window = 16 if i % 2 else None
        h = ops.rms_norm(x, p["n1"], eps=1e-6)
        x = (
            x
            + attend(p, h, positions, segment_ids, window)
            + feed_forward(p, ops.rms_norm(x, p["n2"], eps=1e-6))
        )
    logits = ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-6), params["head"])
    return 30.0 * torch.tanh(logits / 30.0)


model = fm.Model(
    "OddForCausalLM",
    config={"max_position_embeddings": 256},
    params={
        "embed": P("vocab hidden"),
        "layers": [layer() for _ in range(4)],
        "norm": P("hidden", init="ones"),
        "head": P("vocab hidden"),
    },
    forward=forward,
    sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
)
