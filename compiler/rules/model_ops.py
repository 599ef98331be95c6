"""The ops of funcmodels."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from compiler.placement import PARTIAL, REPLICATE, Placement, Shard
from compiler.rules.local import LocalValues, rms_norm_over_ranks, vocab_embed
from compiler.rules.products import contract
from compiler.rules.rule import TOKENS, Decision, Exactly, View, rule
from funcmodels import ops


@rule(ops.rms_norm)
def rms_norm(view: View) -> Decision | None:
    """Over the last dim; where that is cut, the ranks sum their squares."""
    x, weight = view.node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    at = view.whole(x)
    if not isinstance(at, Shard) or at.dim < len(view.type(x).shape) - 1:
        return Decision({x: at, weight: REPLICATE}, at)
    return _over_ranks(view, x, weight, at, dict(view.node.kwargs))


def _over_ranks(
    view: View, x: fx.Node, weight: fx.Node, at: Shard, settings: dict[str, Any]
) -> Decision | None:
    """The norm of a cut dim, and a weight that is cut alike."""
    if view.axis == TOKENS:
        return None
    if at.units == 1:  # every rank has all of it
        return Decision({x: at, weight: Shard(0, 1, at.axis)}, at)
    own, out, needs = Shard(0, at.units, at.axis), at, []
    at_weight = view.whole(weight)
    if isinstance(at_weight, Shard) and at_weight.units != at.units:
        # Declared with an axis of its own, as 2048 columns that are 16 heads.
        units = math.gcd(at_weight.units, at.units)
        if units == 1:
            return None
        needs = [Exactly(units, a, "blocks of two sizes meet") for a in (at.axis, at_weight.axis)]
        own, out = at_weight, Shard(at.dim, units, at.axis)
    args = (x, weight, view.axis)
    return Decision({x: at, weight: own}, out, args, settings, rms_norm_over_ranks, needs)


@rule(ops.layer_norm)
def layer_norm(view: View) -> Decision | None:
    """Over the last dim, which must be whole."""
    x, *rest = view.tensors
    at = view.whole(x)
    if isinstance(at, Shard) and at.dim == len(view.type(x).shape) - 1:
        return None
    return Decision({x: at, **dict.fromkeys(rest, REPLICATE)}, at)


@rule(ops.rope)
def rope(view: View) -> Decision | None:
    """Each head by itself; positions are whole, or cut by tokens as q and k are."""
    q, k = view.node.args[:2]
    positions = view.arg(2, "positions")
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(positions, fx.Node)
    last = len(view.type(q).shape) - 1
    at_q, at_k = view.whole(q), view.whole(k)
    if any(isinstance(at, Shard) and at.dim == last for at in (at_q, at_k)):
        return None
    by_tokens = isinstance(at_q, Shard) and at_q.dim < last - 1
    inputs = {q: at_q, k: at_k, positions: at_q if by_tokens else REPLICATE}
    return Decision(inputs, (at_q, at_k), independent=True)


@rule(ops.attention)
def attention(view: View) -> Decision | None:
    """By heads: query heads are divided, KV heads divided, or replicated where there are fewer."""
    q, k, v = view.node.args[:3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    heads_dim = len(view.type(q).shape) - 2
    heads, kv_heads = view.type(q).shape[-2], view.type(k).shape[-2]
    rest = [n for n in view.tensors if n not in (q, k, v)]
    found = [view.at(n) for n in (q, k, v) if isinstance(view.at(n), Shard)]
    if not found:
        return Decision(dict.fromkeys(view.tensors, REPLICATE), REPLICATE)
    if view.axis == TOKENS:  # the one operation that may look at other tokens: the engine serves it
        by_token = dict.fromkeys((q, k, v), found[0])
        return Decision({**by_token, **dict.fromkeys(rest, REPLICATE)}, found[0])
    if any(at.dim != heads_dim for at in found):  # type: ignore[union-attr]
        return None
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    at_q, at_k = view.at(q), view.at(k)
    axis_q = at_q.axis if isinstance(at_q, Shard) else "heads"
    axis_k = at_k.axis if isinstance(at_k, Shard) else axis_q
    out = Shard(heads_dim, heads, axis_q)
    kv = Shard(heads_dim, kv_heads, axis_k)
    inputs: dict[fx.Node, Placement] = {q: out, k: kv, v: kv, **dict.fromkeys(rest, REPLICATE)}
    kwargs: dict[str, Any] = dict(view.node.kwargs)
    sinks, slopes = kwargs.get("sinks"), kwargs.get("alibi_slopes")
    for per_head in (sinks, slopes):
        if isinstance(per_head, fx.Node):
            inputs[per_head] = Shard(0, heads, axis_q)
    if isinstance(slopes, (tuple, list)):
        kwargs["alibi_slopes"] = LocalValues(tuple(slopes), view.axis)
    return Decision(
        inputs, out, kwargs=kwargs, needs=[Exactly(heads, axis_q, "query heads are divided")]
    )


@rule(ops.embed)
def embed(view: View) -> Decision | None:
    """A vocabulary cut by rows gives a pending sum; one cut by columns, columns."""
    tokens, table = view.node.args
    assert isinstance(tokens, fx.Node) and isinstance(table, fx.Node)
    at, at_tokens = view.at(table), view.at(tokens)
    if isinstance(at_tokens, Shard):
        return Decision({tokens: at_tokens, table: REPLICATE}, at_tokens)
    if not isinstance(at, Shard):
        return Decision({tokens: REPLICATE, table: REPLICATE}, REPLICATE)
    rank = len(view.type(view.node).shape)
    if at.dim == 1:
        return Decision({tokens: REPLICATE, table: at}, Shard(rank - 1, at.units, at.axis))
    vocab = view.type(table).shape[0]
    needs = [Exactly(at.units, at.axis, "the vocabulary is divided")]
    args = (tokens, table, vocab, view.axis)
    return Decision({tokens: REPLICATE, table: at}, PARTIAL, args, {}, vocab_embed, needs)


@rule(ops.unembed)
def unembed(view: View) -> Decision | None:
    """As a linear without bias."""
    x, table = view.node.args
    assert isinstance(x, fx.Node) and isinstance(table, fx.Node)
    lead = [f"b{i}" for i in range(len(view.type(x).shape) - 1)]
    return contract(view, [x, table], [[*lead, "e"], ["v", "e"]], [*lead, "v"])
