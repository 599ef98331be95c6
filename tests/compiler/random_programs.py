"""Random small programs for hypothesis: sizes, an axis table, and steps of several kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

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
    arranged: str  # how the layers' parameters are: "listed", "stacked" or "shared"
    head: str  # how the logits are written


@st.composite
def specs(draw: Any, steps: tuple[str, ...] = (), gathers: bool = False) -> Spec:
    """Programs of some of the steps; with `gathers`, more of those where a value is gathered."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    sizes = {
        "vocab": draw(st.sampled_from([8, 12, 15])),
        "hidden": (hidden := draw(st.sampled_from([6, 8, 12]))),
        "hidden_out": hidden,
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 2, 3])),
        "head_dim": draw(st.sampled_from([2, 4])),
        "mlp": draw(st.sampled_from([4, 6, 12])),
        "rank": 3,
    }
    one = st.sampled_from([(), ("hidden",), ("head_dim",), ("mlp",), ("kv_heads",), ("rank",)])
    # Cuts that few operations keep: of these programs, most gather somewhere.
    odd = st.sampled_from([("hidden", "head_dim"), ("head_dim", "mlp"), ("hidden", "mlp")])
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
        draw(st.one_of(usual, usual, one, *[odd] * gathers)),
        tuple(
            draw(
                st.lists(
                    st.sampled_from(steps or (_GATHERING if gathers else _USUAL)),
                    min_size=1,
                    max_size=4,
                )
            )
        ),
        draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(["listed", "listed", "stacked", "shared"])),
        draw(st.sampled_from(["unembed", "unembed", "matmul", "linear", "einsum"])),
    )


def model_of(spec: Spec) -> fm.Model:
    """The program of a spec."""
    P = fm.axes(**dict(spec.sizes), layers=spec.layers)
    table = dict.fromkeys(spec.table, "tp")

    def params_of(step: str, i: int, lead: str = "") -> dict[str, Any]:
        # A table may put two dims of one tensor on "tp": the second is then left whole.
        found = {
            name: _cut_once(P, f"{lead} {axes}", table) for name, axes in STEPS[step][0].items()
        }
        if step == "some_layers" and i % 2 and not lead:
            del found["w"]
        return found

    def layer(i: int, lead: str = "") -> dict[str, Any]:
        return {f"{j}_{step}": params_of(step, i, lead) for j, step in enumerate(spec.steps)}

    layers: Any = [layer(i) for i in range(spec.layers)]
    if spec.arranged != "listed":
        layers = layer(0, "layers" if spec.arranged == "stacked" else "")
    params: dict[str, Any] = {
        "embed": _cut_once(P, "vocab hidden", table),
        "norm": P("hidden"),
        "layers": layers,
    }
    if not spec.tied:
        params["head"] = _cut_once(P, "vocab hidden", table)

    def own(layers: Any, i: int) -> Any:
        if spec.arranged == "stacked":
            return fm.tree.map(lambda w: w[i], layers)
        return layers if spec.arranged == "shared" else layers[i]

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for i in range(spec.layers):
            p = own(params["layers"], i)
            for j, step in enumerate(spec.steps):
                x = STEPS[step][1](p[f"{j}_{step}"], x, positions)
        if spec.final_norm:
            x = ops.rms_norm(x, params["norm"], eps=1e-5)
        return HEADS[spec.head](x, params["embed"] if spec.tied else params["head"])

    return fm.Model("Random", None, params, forward)


HEADS = {
    "unembed": ops.unembed,
    "matmul": lambda x, w: x @ w.T,
    "linear": F.linear,
    "einsum": lambda x, w: torch.einsum("ve,...e->...v", w, x),
}


def _cut_once(P: fm.Axes, axes: str, table: dict[str, str]) -> fm.Param:
    names = axes.split()
    first = next((axis for axis in names if axis in table), None)
    return P(axes, sharding=fm.PartitionSpec(*("tp" if a == first else None for a in names)))


# The steps: each a function of its parameters, an activation (*batch, hidden) and positions


def _qkv(p: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (einsum(x, p[name], "... e, h d e -> ... h d") for name in "qkv")
    return q, k, v


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


@fm.block
def mapped_heads(p, x, positions):
    """A vmap over heads, with a split and a concatenation in it."""

    def head(w, scale):
        a, b = (x @ w.T).chunk(2, -1)
        return torch.cat((torch.tanh(b) * scale, a), -1)

    h = vmap(head, out_dims=-2)(p["q"], p["scale"])
    return x + einsum(h, p["o"], "... h d, e h d -> ... e")


def mapped_products(p, x, positions):
    """Both projections of each head by a vmap, summed."""
    one = vmap(lambda w, o: torch.tanh(x @ w.T) @ o.T, in_dims=(0, 1))
    return x + one(p["q"], p["o"]).sum(0)


@fm.block
def checkpointed(p, x, positions):
    return checkpoint(gated, p, x, positions, use_reentrant=False)


@fm.block
def factors(p, x, positions):
    """Low-rank factors multiplied before use, beside the matrix that they change."""
    return x + x @ (p["b"] @ p["a"] + p["w"]).T


@fm.block
def tied_matrix(p, x, positions):
    """One matrix, and the same one transposed, and a reduction of it."""
    return x + torch.tanh(x @ p["up"].T) @ p["up"] + p["up"].square().mean(0)


@fm.block
def sliced(p, x, positions):
    n = x.shape[-1]
    h = torch.cat((x, x * p["scale"]), -1)[..., 1 : n + 1]
    return x + h * p["bias"].flip(0) + p["scale"][: n // 2].sum() * p["gain"]


def some_layers(p, x, positions):
    """A parameter that only every other layer has."""
    return x + x @ p["w"].T * p["gain"] if "w" in p else x * p["gain"]


@fm.block
def convolved(p, x, positions):
    """A causal convolution over time, channel by channel: it mixes tokens."""
    h = einsum(x, p["gate"], "... e, f e -> f ...")
    if h.dim() == 3:
        h = h.movedim(0, 1)
    width = p["taps"].shape[-1]
    h = torch.conv1d(h, p["taps"][:, None], padding=width - 1, groups=h.shape[-2])
    h = F.silu(h[..., : x.shape[-2]]).transpose(-1, -2)
    return x + h @ p["down"].T


@fm.block
def picked(p, x, positions):
    """Sorting, gathering, indices by numbers, and what goes along a dim."""
    h = einsum(x, p["q"], "... e, h d e -> ... h d")
    best = h.topk(2, -1).values.sum(-1, keepdim=True) + h.sort(-1).values
    turned = h.gather(-1, h.argsort(-1)) + h[..., [1, 0] * (h.shape[-1] // 2)]
    y = best * 0.5 + turned.masked_fill(h > 1, 0.5) + h.cumsum(-1) / 4
    return x + einsum(y.logsumexp(-1, keepdim=True) + y, p["o"], "... h d, e h d -> ... e")


@fm.block
def rearranged(p, x, positions):
    """Flat projections, whatever way einops sees them."""
    q = x @ rearrange(p["q"], "h d e -> e (h d)")
    q = rearrange(q, "... (h d) -> ... h d", h=p["q"].shape[0])
    q = F.rms_norm(q, q.shape[-1:], eps=1e-5)
    q = torch.where(q > 0, q, 0.5 * q)
    return x + rearrange(q, "... h d -> ... (h d)") @ rearrange(p["o"], "e h d -> (h d) e")


@fm.block
def normed_wide(p, x, positions):
    """Norms over dims that may be cut, and statistics of them."""
    h = einsum(x, p["gate"], "... e, f e -> ... f")
    h = ops.rms_norm(h, p["mlp_norm"], eps=1e-5)
    h = (h - h.mean(-1, keepdim=True)) / (1 + h.var(-1, keepdim=True)).sqrt()
    h = h.softmax(-1) + F.normalize(h, dim=-1) + h.amax(-1, keepdim=True)
    return x + torch.einsum("...f,ef->...e", h, p["down"])


@fm.block
def scrambled(p, x, positions):
    """Along the features of a projection: gathered where these are cut."""
    h = einsum(x, p["gate"], "... e, f e -> ... f")
    h = h.cumsum(-1) / 4 + h.flip(-1) + h.roll(1, -1).sort(-1).values
    return x + torch.tanh(h) @ p["down"].T


@fm.block
def grouped(p, x, positions):
    """Norms of groups and of channels, pools, and what goes along a dim of the heads'."""
    h = einsum(x, p["q"], "... e, h d e -> ... h d")
    lead, (heads, width) = h.shape[:-2], h.shape[-2:]
    flat = h.reshape(-1, heads, width)
    normed = F.group_norm(flat, heads) + F.instance_norm(flat) + F.local_response_norm(flat, 2)
    pooled = F.avg_pool1d(flat, 2).repeat_interleave(2, -1) + F.interpolate(flat, scale_factor=1)
    h = (normed + pooled).reshape(*lead, heads, width)
    h = h + torch.trapezoid(h, dim=-1)[..., None] + torch.take_along_dim(h, h.argsort(-1), -1)
    return x + einsum(torch.tanh(h), p["o"], "... h d, e h d -> ... e")


@fm.block
def turned(p, x, positions):
    """Pairs as complex numbers, a spectrum, and bits."""
    h = einsum(x, p["q"], "... e, h d e -> ... h d").double()
    z = torch.view_as_complex(h.unflatten(-1, (-1, 2)))
    turns = torch.polar(torch.ones_like(p["scale"]).double(), p["scale"].double())[:, None]
    h = torch.view_as_real(z * turns).flatten(-2)
    h = h + torch.fft.irfft(torch.fft.rfft(h) * 2, n=h.shape[-1]) + torch.fft.fft(h).real
    sign = (h.view(torch.int64) >> 62).to(x.dtype)
    return x + einsum(torch.tanh(h.to(x.dtype)) + sign, p["o"], "... h d, e h d -> ... e")


@fm.block
def written(p, x, positions):
    """Parts in the place of others, and added to them."""
    h = einsum(x, p["gate"], "... e, f e -> ... f")
    n = h.shape[-1] // 2
    first, second = h.tensor_split(2, -1)
    h = h.slice_scatter(first * second, -1, n).select_scatter(h.select(-1, 0).tanh(), -1, n)
    index = torch.tensor([1, 0])
    h = h.index_add(-1, index, first[..., :2]) + h.index_fill(-1, index, 0.5)
    places = h.argsort(-1)
    h = h.scatter_add(-1, places, h.sin()) + h.scatter(-1, places, 0.5 * h)
    return x + torch.tanh(h.index_copy(-1, index, second[..., :2])) @ p["down"].T


@fm.block
def near(p, x, positions):
    """Distances to rows of a matrix, and places in a sorted one."""
    rows = torch.cdist(x.reshape(-1, x.shape[-1]), p["up"]).reshape(*x.shape[:-1], -1)
    borders = p["mlp_norm"].detach().sort().values
    places = torch.searchsorted(borders, rows.detach()) + torch.bucketize(rows.detach(), borders)
    odd = torch.isin(places, torch.tensor([0, 2, 4]))
    h = torch.where(odd, rows, -rows) / (1 + rows) + 0.1 * places.to(x.dtype)
    return x + h @ p["down"].T


@fm.block
def put_together(p, x, positions):
    """Stacks and splits by their other names, diagonals and cross products."""
    h = einsum(x, p["q"], "... e, h d e -> ... h d")
    flat = h.reshape(-1, *h.shape[-2:])
    a, b = flat.dsplit(2)
    tall = torch.hstack((flat, flat))[:, : flat.shape[1]] + torch.dstack((b, a))
    square = einsum(tall, tall, "t h a, t h b -> t h a b")
    lines = square.diagonal(dim1=-2, dim2=-1) + torch.diag_embed(tall).sum(-1)
    three = torch.stack((lines, tall, flat), -1)
    h = (
        torch.linalg.cross(three, three.roll(1, -1)).sum(-1)
        + torch.rot90(square, 2, (2, 3))[..., 0]
    )
    h = h.reshape(h.shape[0], -1).reshape(*x.shape[:-1], *h.shape[1:])
    return x + einsum(torch.tanh(h), p["o"], "... h d, e h d -> ... e")


def shared_keys(p, x, positions):
    """Two attentions with the same keys and values, the second of which carries the first's on."""
    q, k, v = _qkv(p, ops.rms_norm(x, p["norm"], eps=1e-5))
    q, k = ops.rope(q, k, positions, theta=100.0)
    first = ops.attention(q, k, v)
    second = ops.attention(q * p["scale"][:, None], k, v + 0.1 * k, window=2)
    return x + einsum(first + second, p["o"], "... h d, e h d -> ... e")


QKVO = {
    "q": "heads head_dim hidden",
    "k": "kv_heads head_dim hidden",
    "v": "kv_heads head_dim hidden",
    "o": "hidden heads head_dim",
}
QO = {"q": QKVO["q"], "o": QKVO["o"]}
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
    "mapped_heads": (QO | {"scale": "heads"}, mapped_heads),
    "mapped_products": (QO, mapped_products),
    "checkpointed": (GATED, checkpointed),
    "factors": ({"a": "rank hidden", "b": "hidden_out rank", "w": "hidden_out hidden"}, factors),
    "tied_matrix": ({"up": "mlp hidden"}, tied_matrix),
    "sliced": ({"scale": "hidden", "bias": "hidden", "gain": ""}, sliced),
    "some_layers": ({"w": "hidden_out hidden", "gain": ""}, some_layers),
    "convolved": ({"gate": "mlp hidden", "taps": "mlp rank", "down": "hidden mlp"}, convolved),
    "picked": (QO, picked),
    "rearranged": (QO, rearranged),
    "normed_wide": (GATED | {"mlp_norm": "mlp"}, normed_wide),
    "scrambled": (GATED, scrambled),
    "grouped": (QO, grouped),
    "turned": (QO | {"scale": "heads"}, turned),
    "written": (GATED, written),
    "near": (GATED | {"mlp_norm": "mlp"}, near),
    "put_together": (QO, put_together),
    "shared_keys": (QKVO | {"norm": "hidden", "scale": "heads"}, shared_keys),
}
# Not among what is emitted at random: most of it gathers, or is slow to be recorded.
_ODD = ("scrambled", "grouped", "turned", "written", "near", "put_together")
_USUAL = tuple(step for step in STEPS if step not in _ODD)
_GATHERING = (*STEPS, "scrambled", "scrambled", "picked")
