"""Latent attention is divided by heads, like any other; what it caches is whole on each rank."""

from __future__ import annotations

from torch import fx

from compiler.placement import REPLICATE, Placement, Shard
from compiler.rules.rule import TOKENS, Decision, Exactly, View, rule
from funcmodels import ops


@rule(ops.latent_attention)
def latent_attention(view: View) -> Decision | None:
    """By heads: queries and the up-projection are cut, the latent and its rope key are not."""
    q_nope, q_rope, latent, k_rope, kv_up = (
        view.arg(i, name)
        for i, name in enumerate(("q_nope", "q_rope", "latent", "k_rope", "kv_up"))
    )
    whole: dict[fx.Node, Placement] = dict.fromkeys(view.tensors, REPLICATE)
    found = [view.at(n) for n in (q_nope, q_rope, latent, k_rope, kv_up)]
    cut = [at for at in found if isinstance(at, Shard)]
    if not cut:
        return Decision(whole, REPLICATE)
    if view.axis == TOKENS:  # as ops.attention, it finds a request's other tokens in the cache
        if isinstance(view.at(kv_up), Shard):
            return None
        by_token = dict.fromkeys((q_nope, q_rope, latent, k_rope), cut[0])
        return Decision({**whole, **by_token}, cut[0])
    heads_dim, heads = len(view.type(q_nope).shape) - 2, view.type(q_nope).shape[-2]
    dims = {q_nope: heads_dim, q_rope: heads_dim, kv_up: 0}
    for node, at in zip((q_nope, q_rope, latent, k_rope, kv_up), found, strict=True):
        if isinstance(at, Shard) and dims.get(node) != at.dim:
            return None
    assert isinstance(heads, int)
    axis = cut[0].axis
    out = Shard(heads_dim, heads, axis)
    by_head = {q_nope: out, q_rope: out, kv_up: Shard(0, heads, axis)}
    needs = [Exactly(heads, axis, "query heads are divided")]
    return Decision({**whole, **by_head}, out, needs=needs)
