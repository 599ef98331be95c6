"""Models whose layers keep a recurrent state: one of their own, ready-made ones, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum

import funcmodels as fm
from funcmodels import ops

P = fm.axes(
    vocab=256, hidden=64, heads=4, kv_heads=2, head_dim=32, key=8, value=16, inner=64, width=4
)


def leaky_step(state, x):
    """A running mean and a running maximum of each head's values, with a learned decay.

    Returned in another order than they are declared in, which must not matter.
    """
    mean = x["keep"][..., None] * state["mean"] + (1 - x["keep"])[..., None] * x["v"]
    top = torch.maximum(state["top"] * 0.9, x["v"])
    return {"top": top, "mean": mean}, mean + 0.1 * top


def mixed_step(state, x):
    """A linear recurrence of each feature, with a decay for each head."""
    h = x["keep"][..., None] * state["h"] + x["v"]
    return {"h": h}, h


def mixed_chunk(state, x):
    """The same for several tokens, by its associative form."""
    keep, h = ops.associative_scan(after, (x["keep"][..., None], x["v"]), dim=-3)
    h = h + keep * state["h"][..., None, :, :]
    return {"h": h[..., -1, :, :]}, h


def after(first, second):
    """One linear map after another."""
    (a1, b1), (a2, b2) = first, second
    return a1 * a2, a2 * b1 + b2


def odd_step(state, x):
    """States of four dtypes, and an operation that no sharding rule knows."""
    n = state["n"] + 1
    turned = state["turned"] * (0.6 + 0.5j) + x
    M = 0.5 * state["M"] + einsum(x, x, "... h a, ... h b -> ... h a b")
    y = turned.real / n[..., None].float() + 0.1 * state["last"].float()
    y = y + torch.cholesky_inverse(M + 4 * torch.eye(P.sizes["value"]))[..., 0]
    return {"last": x.to(state["last"].dtype), "M": M, "turned": turned, "n": n}, y


def linear_params():
    return {
        "norm": P("hidden", init="ones"),
        "q": P("heads key hidden"),
        "k": P("heads key hidden"),
        "v": P("heads value hidden"),
        "g": P("heads hidden"),
        "beta": P("heads hidden"),
        "o": P("hidden heads value"),
    }


@fm.block
def linear(p, x, segment_ids, kind):
    h = ops.rms_norm(x, p["norm"], eps=1e-6)
    q, k, v = (einsum(h, p[name], "... e, h d e -> ... h d") for name in "qkv")
    g = F.logsigmoid(einsum(h, p["g"], "... e, h e -> ... h").float())
    if kind == "delta":
        beta = einsum(h, p["beta"], "... e, h e -> ... h").float().sigmoid()
        k = F.normalize(k.float(), dim=-1)
        y = ops.gated_delta_rule(q, k, v, g, beta, segment_ids=segment_ids)
    elif kind == "by_key":
        by_key = g[..., None] * F.softplus(k.float())
        y = ops.gated_linear_attention(q, k, v, by_key, segment_ids=segment_ids)
    elif kind == "linear":
        y = ops.gated_linear_attention(q, k, v, g, segment_ids=segment_ids)
    elif kind == "odd":
        state = fm.state(
            n="heads", turned="heads value", M="heads value other", last="heads value",
            dtype={"n": torch.int64, "turned": torch.complex64, "M": torch.float32,
                   "last": torch.bfloat16},
            heads=P.sizes["heads"], value=P.sizes["value"], other=P.sizes["value"],
        )  # fmt: skip
        y = ops.recurrent(odd_step, state, 0.3 * v.float(), segment_ids=segment_ids).to(x.dtype)
    elif kind == "scanned":
        state = fm.state(
            h="heads value", dtype=torch.float32, heads=P.sizes["heads"], value=P.sizes["value"]
        )
        xs = {"keep": g.exp(), "v": v.float()}
        y = ops.recurrent(
            mixed_step, state, xs, chunked=mixed_chunk, chunk=32, segment_ids=segment_ids
        )
        y = y.to(x.dtype)
    else:
        state = fm.state(
            mean="heads value", top="heads value", dtype=torch.float32,
            init={"mean": 0.0, "top": -1.0}, heads=P.sizes["heads"], value=P.sizes["value"],
        )  # fmt: skip
        xs = {"keep": g.exp(), "v": v.float()}
        y = ops.recurrent(leaky_step, state, xs, segment_ids=segment_ids).to(x.dtype)
    return x + einsum(y, p["o"], "... h d, e h d -> ... e")


def conv_params():
    return {
        "norm": P("hidden", init="ones"),
        "in": P("inner hidden"),
        "gate": P("inner hidden"),
        "conv": P("inner width"),
        "out": P("hidden inner"),
    }


@fm.block
def conv(p, x, segment_ids):
    h = ops.rms_norm(x, p["norm"], eps=1e-6)
    u = einsum(h, p["in"], "... e, f e -> ... f")
    gate = einsum(h, p["gate"], "... e, f e -> ... f")
    u = ops.short_conv(u, p["conv"], segment_ids=segment_ids)
    return x + einsum(F.silu(gate) * u, p["out"], "... f, e f -> ... e")


def ssd_params():
    return {
        "norm": P("hidden", init="ones"),
        "x": P("heads value hidden"),
        "dt": P("heads hidden"),
        "B": P("key hidden"),
        "C": P("key hidden"),
        "conv": P("key width"),
        "A": P("heads", init="ones"),
        "D": P("heads", init="ones"),
        "o": P("hidden heads value"),
    }


@fm.block
def state_space(p, x, segment_ids):
    """One group: its B and C are whole on every rank, its heads are cut. Two states in a module."""
    h = ops.rms_norm(x, p["norm"], eps=1e-6)
    dt = F.softplus(einsum(h, p["dt"], "... e, h e -> ... h").float())
    B, C = (einsum(h, p[name], "... e, n e -> ... n") for name in "BC")
    B = ops.short_conv(B, p["conv"], segment_ids=segment_ids)
    y = einsum(h, p["x"], "... e, h d e -> ... h d")
    B, C = B.unsqueeze(-2), C.unsqueeze(-2)
    y = ops.ssd(y, dt, -p["A"].float(), B, C, D=p["D"], segment_ids=segment_ids)
    return x + einsum(y, p["o"], "... h d, e h d -> ... e")


def attention_params():
    return {
        "norm": P("hidden", init="ones"),
        "q": P("heads head_dim hidden"),
        "k": P("kv_heads head_dim hidden"),
        "v": P("kv_heads head_dim hidden"),
        "o": P("hidden heads head_dim"),
    }


@fm.block
def attention(p, x, positions, segment_ids):
    h = ops.rms_norm(x, p["norm"], eps=1e-6)
    q, k, v = (einsum(h, p[name], "... e, h d e -> ... h d") for name in "qkv")
    q, k = ops.rope(q, k, positions, theta=1e4)
    o = ops.attention(q, k, v, segment_ids=segment_ids)
    return x + einsum(o, p["o"], "... h d, e h d -> ... e")


def loose_model() -> fm.Model:
    """Recurrences outside of a list of layers: in a block of its own, and in forward itself."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        x = linear(params["one"], x, segment_ids, "own")
        x = x + ops.short_conv(x, params["conv"], segment_ids=segment_ids)
        x = attention(params["other"], x, positions, segment_ids)
        return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-6), params["embed"])

    return fm.Model(
        "LooseForCausalLM",
        config={
            "max_position_embeddings": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
        },
        params={
            "embed": P("vocab hidden"),
            "one": linear_params(),
            "conv": P("hidden width"),
            "other": attention_params(),
            "norm": P("hidden", init="ones"),
        },
        forward=forward,
        sharding=dict.fromkeys(("vocab", "heads", "kv_heads"), "tp"),
    )


CUT = {"attention": ["heads", "kv_heads"], "conv": ["inner"]}
PARAMS = {"attention": attention_params, "conv": conv_params, "ssd": ssd_params}


def recurrent_model(*kinds: str) -> fm.Model:
    """A model of one layer of each kind: attention, conv, ssd, linear, delta, by_key,
    scanned, odd or own.
    """

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for p, kind in zip(params["layers"], kinds, strict=True):
            if kind == "attention":
                x = attention(p, x, positions, segment_ids)
            elif kind == "conv":
                x = conv(p, x, segment_ids)
            elif kind == "ssd":
                x = state_space(p, x, segment_ids)
            else:
                x = linear(p, x, segment_ids, kind)
        return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-6), params["embed"])

    return fm.Model(
        "Recurrent" + "".join(kind.title() for kind in kinds) + "ForCausalLM",
        config={
            "max_position_embeddings": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
        },
        params={
            "embed": P("vocab hidden"),
            "layers": [PARAMS.get(kind, linear_params)() for kind in kinds],
            "norm": P("hidden", init="ones"),
        },
        forward=forward,
        sharding=dict.fromkeys(
            ("vocab", *(a for kind in kinds for a in CUT.get(kind, ["heads"]))), "tp"
        ),
    )
