"""Models that use parameters and layers in ways that no published architecture does all at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import funcmodels as fm
from funcmodels import ops

LAYERS = 4
P = fm.axes(
    vocab=256,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    mlp=192,
    rank=16,
    two=2,
    wide=160,
    layers=LAYERS,
    positions=256,
    columns=128,
    quarter=32,
)
TABLE = {"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"}


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm(x, weight, eps=1e-5)


def project(x: Tensor, w: Tensor) -> Tensor:
    return einsum(x, w, "... e, h d e -> ... h d")


def attention_weights() -> dict[str, Any]:
    """Of a layer whose heads stay apart, with its norm."""
    return {
        "norm": P("hidden", init="ones"),
        "q": P("heads head_dim hidden"),
        "k": P("kv_heads head_dim hidden"),
        "v": P("kv_heads head_dim hidden"),
        "o": P("hidden heads head_dim"),
    }


# Stacked: weights of all layers in one tensor; what flows between layers is irregular


@fm.block
def keys_and_values(p: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    k, v = project(x, p["k"]), project(x, p["v"])
    return ops.rope(k, k, positions, theta=1e4)[1], v


@fm.block
def attend(p: Any, x: Tensor, k: Tensor, v: Tensor, positions: Tensor, segment_ids, window):
    """Attention to keys and values of this layer or of another one."""
    q = project(x, p["q"])
    q, _ = ops.rope(q, q, positions, theta=1e4)
    o = ops.attention(q, k, v, window=window, segment_ids=segment_ids)
    return rearrange(o, "... h d -> ... (h d)") @ rearrange(p["o"], "e h d -> (h d) e")


@fm.block
def gated(p: Any, x: Tensor) -> Tensor:
    """Both matrices of the gate in one tensor."""
    gate, up = p["gate_up"].unbind(0)
    return ops.swiglu(x @ gate.T, F.linear(x, up)) @ p["down"].T


def stacked_forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["embed"])
    first: Any = None
    kv: Any = None
    for i in range(LAYERS):
        p = fm.tree.map(lambda w, i=i: w[i], params["layers"])
        h = norm(x, p["norm"])
        if i % 2 == 0:  # the odd layers attend to the keys and values of the one before
            kv = keys_and_values(p, h, positions)
        k, v = kv
        if first is None:
            first = v  # the values of the first layer are carried to all others
        v = v + first * p["mix"]
        window = None if i % 2 else 16
        x = x + attend(p, h, k, v, positions, segment_ids, window) + p["gain"] * gated(p, h)
    return ops.unembed(norm(x, params["norm"]), params["head"])


stacked = fm.Model(
    "StackedForCausalLM",
    config={"max_position_embeddings": 256},
    params={
        "embed": P("vocab hidden"),
        "layers": {
            "norm": P("layers hidden", init="ones"),
            "q": P("layers heads head_dim hidden"),
            "k": P("layers kv_heads head_dim hidden", hf="at.{layers}.k.weight"),
            "v": P("layers kv_heads head_dim hidden"),
            "o": P("layers hidden heads head_dim"),
            "gate_up": P("layers two mlp hidden"),
            "down": P("layers hidden mlp"),
            "mix": P("layers"),
            "gain": P("layers", init="ones"),
        },
        "norm": P("hidden", init="ones"),
        "head": P("vocab hidden"),
    },
    forward=stacked_forward,
    sharding=TABLE,
)


# Shared: one set of weights for several layers, and weights made of others


@fm.block
def shared_layer(p: Any, own: Any, x: Tensor, positions: Tensor, segment_ids) -> Tensor:
    """The layer that all share, with norms and a low-rank change of its own."""
    h = norm(x, own["norm"])
    change = einsum(own["b"], own["a"], "h d r, r e -> h d e")
    q = project(h, p["q"] + change)
    q = norm(q.flatten(-2), own["q_norm"].flatten()).unflatten(-1, q.shape[-2:])
    k, v = project(h, p["k"]), project(h, p["v"])
    q, k = ops.rope(q, k, positions, theta=1e4)
    o = ops.attention(q, k, v, segment_ids=segment_ids)
    return x + einsum(o, p["o"], "... h d, e h d -> ... e") * p["scale"]


@fm.block
def autoencoder(p: Any, x: Tensor) -> Tensor:
    """A matrix, and the same one transposed; a slice of a third; one norm twice."""
    h = norm(torch.relu(norm(x, p["norm"]) @ p["up"].T) @ p["up"], p["norm"])
    return x + h * p["wide"][: x.shape[-1]]


def shared_forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["embed"])
    for i, own in enumerate(params["layers"]):
        x = shared_layer(params["shared"], own, x, positions, segment_ids)
        if i % 2:
            x = autoencoder({**own["extra"], "wide": params["wide"]}, x)
    x = shared_layer(params["shared"], params["layers"][0], x, positions, segment_ids)
    x = norm(x, params["layers"][0]["norm"])
    return x @ params["embed"].T


def shared_own(i: int) -> dict[str, Any]:
    own: dict[str, Any] = {
        "norm": P("hidden", init="ones"),
        "q_norm": P("heads head_dim", init="ones"),  # over all heads, which are cut
        "a": P("rank hidden"),
        "b": P("heads head_dim rank"),
    }
    if i % 2:
        own["extra"] = {"norm": P("hidden", init="ones"), "up": P("mlp hidden")}
    return own


shared = fm.Model(
    "SharedForCausalLM",
    config={"max_position_embeddings": 256},
    params={
        "embed": P("vocab hidden"),
        "shared": {
            "q": P("heads head_dim hidden"),
            "k": P("kv_heads head_dim hidden"),
            "v": P("kv_heads head_dim hidden"),
            "o": P("hidden heads head_dim"),
            "scale": P("", init="ones"),
        },
        "layers": [shared_own(i) for i in range(LAYERS)],
        "wide": P("wide", init="ones"),
        "never_used": P("wide"),
    },
    forward=shared_forward,
    sharding=TABLE,
)


# Mapped: transforms, checkpoints and two kinds of layers in turn


@fm.block
def mapped(p: Any, x: Tensor, positions: Tensor, segment_ids) -> Tensor:
    """Each head's projections by a vmap, and a normalised product of each head's output."""
    h = norm(x, p["norm"])
    q, k, v = (vmap(lambda w: h @ w.T, out_dims=-2)(p[name]) for name in "qkv")
    q, k = ops.rope(q, k, positions, theta=1e4)
    o = ops.attention(q, k, v, segment_ids=segment_ids)

    def head(y: Tensor, gain: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        return torch.cat((torch.tanh(b), a), -1) * gain

    o = vmap(head, in_dims=(-2, 0), out_dims=-2)(o, p["gain"])
    return x + einsum(o, p["o"], "... h d, e h d -> ... e")


def feed_forward(p: Any, x: Tensor) -> Tensor:
    return x + F.gelu(F.linear(norm(x, p["norm"]), p["up"], p["bias"])) @ p["down"].T


@fm.block
def saving(p: Any, x: Tensor) -> Tensor:
    return checkpoint(feed_forward, p, x, use_reentrant=False)


def mapped_forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["embed"])
    x = mapped(params["front"], x, positions, segment_ids)
    for i, p in enumerate(params["layers"]):
        x = saving(p, x) if i % 2 else mapped(p, x, positions, segment_ids)
    return F.linear(norm(x, params["norm"]), params["head"])


def mapped_own() -> dict[str, Any]:
    return attention_weights() | {"gain": P("heads", init="ones")}


def saving_own() -> dict[str, Any]:
    return {
        "norm": P("hidden", init="ones"),
        "up": P("mlp hidden"),
        "bias": P("mlp", init="zeros"),
        "down": P("hidden mlp"),
    }


mapping = fm.Model(
    "MappedForCausalLM",
    config={"max_position_embeddings": 256},
    params={
        "embed": P("vocab hidden"),
        "front": mapped_own(),
        "layers": [saving_own() if i % 2 else mapped_own() for i in range(LAYERS)],
        "norm": P("hidden", init="ones"),
        "head": P("vocab hidden"),
    },
    forward=mapped_forward,
    sharding=TABLE,
)

# Crossing: what is cut over the ranks is normalised, compared and chosen from over all of them


@fm.block
def crossing(p: Any, x: Tensor, positions: Tensor, segment_ids) -> Tensor:
    q, k, v = (project(norm(x, p["norm"]), p[name]) for name in ("q", "k", "v"))
    q, k = ops.rope(q, k, positions, theta=1e4)
    o = rearrange(ops.attention(q, k, v, segment_ids=segment_ids), "... h d -> ... (h d)")
    o = ops.layer_norm(o, p["scale"], p["shift"], eps=1e-5)
    x = x + F.linear(o, rearrange(p["o"], "e h d -> e (h d)"))
    h = F.linear(x, p["up"])
    rest = 0.3 * (h - h.amax(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1.0)
    first = h.argmax(-1, keepdim=True) < 96
    h = torch.where(first, h.softmax(-1) * 20.0, rest + 0.1 * h.logsumexp(-1, keepdim=True))
    return x + F.linear(h, p["down"])


def crossing_forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["embed"])
    for p in params["layers"]:
        x = crossing(p, x, positions, segment_ids)
    return F.linear(norm(x, params["norm"]), params["head"])


def crossing_own() -> dict[str, Any]:
    return attention_weights() | {
        "scale": P("columns", init="ones"),
        "shift": P("columns", init="zeros"),
        "up": P("mlp hidden"),
        "down": P("hidden mlp"),
    }


crossed = fm.Model(
    "CrossedForCausalLM",
    config={"max_position_embeddings": 256},
    params={
        "embed": P("vocab hidden"),
        "layers": [crossing_own() for _ in range(2)],
        "norm": P("hidden", init="ones"),
        "head": P("vocab hidden"),
    },
    forward=crossing_forward,
    sharding=TABLE,
)

# Turned: from the last layer of a list to its first, of which every other one has keys and values,
# and one a window; scalars in a list of their own; a vocabulary of two factors, both of them tied


@fm.block
def own_keys(p: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = F.rms_norm(x, x.shape[-1:])
    return project(h, p["k"]), project(h, p["v"])


@fm.block
def turned_attention(p: Any, x: Tensor, k: Tensor, v: Tensor, gain: Tensor, segment_ids, window):
    q = project(F.rms_norm(x, x.shape[-1:]), p["q"])
    slopes = tuple(2.0 ** -(i + 1) for i in range(4))
    o = ops.attention(q, k, v, alibi_slopes=slopes, window=window, segment_ids=segment_ids)
    return x + gain * F.linear(o.flatten(-2), p["o"].flatten(1), p["shift"])


@fm.block
def turned_mlp(p: Any, x: Tensor) -> Tensor:
    h = F.relu(F.linear(F.rms_norm(x, x.shape[-1:]), p["up"])).square()
    h = F.rms_norm(h, h.shape[-1:])  # over all ranks
    return x + F.linear(h, p["down"], p["shift"])


def turned_forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["codes"]) @ params["factor"]
    kv: Any = None
    for i in reversed(range(LAYERS)):
        p = params["layers"][i]
        kv = own_keys(p["kv"], x) if "kv" in p else kv
        window = 4 if i == 1 else None
        x = turned_attention(p["attn"], x, *kv, params["gains"][i], segment_ids, window)
        x = turned_mlp(p["mlp"], x)
    return F.rms_norm(x, x.shape[-1:]) @ params["factor"].T @ params["codes"].T


def turned_own(i: int) -> dict[str, Any]:
    own: dict[str, Any] = {
        "attn": {
            "q": P("heads head_dim hidden"),
            "o": P("hidden heads head_dim"),
            "shift": P("hidden"),
        },
        "mlp": {"up": P("mlp hidden"), "down": P("hidden mlp"), "shift": P("hidden")},
    }
    if i % 2:
        own["kv"] = {"k": P("kv_heads head_dim hidden"), "v": P("kv_heads head_dim hidden")}
    return own


turned = fm.Model(
    "TurnedForCausalLM",
    config={"max_position_embeddings": 256},
    params={
        "codes": P("vocab rank"),
        "factor": P("rank hidden"),
        "layers": [turned_own(i) for i in range(LAYERS)],
        "gains": P("layers", init="ones"),
    },
    forward=turned_forward,
    sharding=TABLE,
)

# Pairs: rope in complex numbers, groups of channels, stretches of them written and pooled


def turned_pairs(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


@fm.block
def paired_attention(p: Any, x: Tensor, positions: Tensor, segment_ids) -> Tensor:
    q, k, v = (project(norm(x, p["norm"]), p[name]) for name in ("q", "k", "v"))
    angles = positions[..., None, None] * 100.0 ** (-torch.arange(0, 32, 2) / 32)
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = turned_pairs(q, turn), turned_pairs(k, turn)
    o = ops.attention(q, k, v, segment_ids=segment_ids)
    rows = rearrange(o, "... h d -> (...) (h d)")
    groups = F.group_norm(rows, 8, p["scale"], p["shift"], 1e-5)
    return x + F.linear(groups.reshape(*x.shape[:-1], -1), rearrange(p["o"], "e h d -> e (h d)"))


@fm.block
def written_mlp(p: Any, x: Tensor, positions: Tensor) -> Tensor:
    pooled = F.avg_pool1d(x, 4) + F.max_pool1d(x, 4)
    near = torch.cdist(pooled, p["places"], compute_mode="donot_use_mm_for_euclid_dist")
    h = F.linear(x, p["up"]).unflatten(-1, (-1, 4))
    h = h.select_scatter(h[..., 1] * pooled.mean(-1, keepdim=True), -1, 2)
    h = h.slice_scatter(torch.tanh(h[..., :2]), -1, 0, 2)
    h = h.index_add(-1, torch.tensor([0, 3]), h[..., 1:3]) * h.new_tensor([0.5, 1.0, 2.0, 1.0])
    h = torch.where(h.float().view(torch.int32) < 0, 0.1 * h, h)
    z = torch.view_as_complex(h.float().unflatten(-1, (2, 2)))
    z = z.conj().flip(-2).resolve_conj()  # of all ranks
    h = torch.view_as_real(z).flatten(-3).to(x.dtype)
    first = torch.searchsorted(torch.tensor([2, 9]), positions) * torch.isin(
        positions, torch.arange(40)
    )
    x = x * torch.cos(0.1 * first.to(x.dtype))[..., None]
    return x + F.linear(h, p["down"]) + F.linear(torch.exp(-near), p["from_places"])


def paired_forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["embed"])
    for p in params["layers"]:
        x = paired_attention(p["attn"], x, positions, segment_ids)
        x = written_mlp(p["mlp"], x, positions)
    return F.linear(norm(x, params["norm"]), params["head"])


def paired_own() -> dict[str, Any]:
    own = crossing_own()
    own["scale"] = own["shift"] = P("columns", sharding=fm.PartitionSpec("tp"))
    mlp = {"up": own.pop("up"), "down": own.pop("down")}
    mlp |= {"places": P("rank quarter"), "from_places": P("hidden rank")}
    return {"attn": own, "mlp": mlp}


paired = fm.Model(
    "PairedForCausalLM",
    config={"max_position_embeddings": 256},
    params={
        "embed": P("vocab hidden"),
        "layers": [paired_own() for _ in range(2)],
        "norm": P("hidden", init="ones"),
        "head": P("vocab hidden"),
    },
    forward=paired_forward,
    sharding=TABLE,
)

MODELS = {
    "stacked": stacked,
    "shared": shared,
    "mapped": mapping,
    "crossed": crossed,
    "turned": turned,
    "paired": paired,
}
