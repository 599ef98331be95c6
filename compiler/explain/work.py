"""What each operation costs on one rank: products, weights and states read, and the cache."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from compiler import layers
from compiler.emit.layers import BUILDERS
from compiler.explain.records import Work
from compiler.explain.sizes import Sizes, axis_of, per_token
from compiler.latent_cache import cached_of_latent
from compiler.placement import Shard
from compiler.recurrence import Recurrence, recurrence
from compiler.rewrite import is_param
from compiler.rules import letters_of
from funcmodels import ops
from funcmodels.config_json import config_of_fields
from funcmodels.spec import Model


class Costs:
    """What the nodes of a model's lowered program cost."""

    def __init__(self, model: Model, sizes: Sizes) -> None:
        self.model = model
        self.sizes = sizes
        self.setting = sizes.setting

    def of(self, node: fx.Node, *, in_head: bool) -> Work:
        """What a node costs; in the head, for each sample."""
        found = self._of_layer(node) if node.op == "call_function" else Work()
        if in_head and found != Work():
            return Work(found.flops, found.weight_bytes, found.token_bytes, is_per_sample=True)
        return replace(found, axes=_cut_over(node)) if found != Work() else found

    def _of_layer(self, node: fx.Node) -> Work:
        if node.target is layers.attention:
            return self._attention_work(node)
        if node.target is layers.latent_attention:
            return self._latent_work(node)
        if node.target is recurrence:
            return self._recurrent_work(node)
        params = [n for n in node.all_input_nodes if is_param(n)]
        in_layer = node.target in BUILDERS
        sizes = [prod(self.sizes.param_shape(n, in_layer)) for n in params]
        weights = sum(
            n * self.sizes.itemsize(p.meta["type"].dtype)
            for n, p in zip(sizes, params, strict=True)
        )
        if node.target in (layers.vocab_embedding, ops.embed) or _is_lookup(node):
            return Work(token_bytes=self.sizes.bytes(node))
        if node.target is layers.experts:
            return self._expert_work(node, weights)
        if node.target is layers.linear:
            matrices = node.args[1]
            flops = sum(2 * prod(self.sizes.param_shape(w, True)) for w in matrices)  # type: ignore[union-attr,arg-type]
            return Work(flops, weights)
        if node.target is layers.logits:
            return Work(2 * sizes[0], weights)
        return Work(self._product_flops(node), weights)

    def _expert_work(self, node: fx.Node, weights: int) -> Work:
        """Products of the chosen experts; read are those that a step's tokens choose."""
        matrices: Any = node.args[3]
        count = matrices[0].meta["type"].shape[0]
        k = node.args[2].meta["type"].shape[-1]  # type: ignore[union-attr]
        each = sum(2 * prod(w.meta["type"].shape[1:]) for w in matrices)
        ranks = 1 if node.kwargs["kind"] == "replicated" else self.setting.tp
        return Work(k * each // ranks, weights, chosen=k / count)

    def _attention_work(self, node: fx.Node) -> Work:
        s: Any = node.kwargs
        q, k = node.args[0], node.args[1]
        dims = s["head_dim"] + s["v_head_dim"]
        cached = s.get("causal", True)  # an encoder sees its whole input at once
        heads, kv_heads = self._heads(q, s["heads"]), self._heads(k, s["kv_heads"])
        return Work(
            attention_flops=2 * heads * dims,
            kv_bytes=kv_heads * dims * self.setting.kv_dtype.itemsize if cached else 0,
            window=s.get("window"),
            cache_axis=axis_of(k),
        )

    def _recurrent_work(self, node: fx.Node) -> Work:
        """The products of a step, and the state that it reads and writes."""
        found: Recurrence = node.kwargs["recurrence"]  # type: ignore[assignment]
        size = 0
        for (_, slot), at in zip(found.slots, found.placements, strict=True):
            count = prod(slot.shape)
            count = self.sizes.share(at, count) if isinstance(at, Shard) else count
            size += count * self.sizes.itemsize(slot.dtype)
        products = (n for n in found.step.graph.nodes if n.op == "call_function")
        return Work(sum(map(self._product_flops, products)), state_bytes=size)

    def _latent_work(self, node: fx.Node) -> Work:
        q_nope, q_rope, latent = (self.sizes.local(n) for n in node.args[:3])  # type: ignore[arg-type]
        heads, nope, rope, rank = *q_nope[1:], q_rope[2], latent[1]
        dv = self.sizes.local(node)[1] // heads
        kept, text = cached_of_latent(config_of_fields(self.model), rank, rope)
        axis = "" if kept else axis_of(node.args[0])
        if not kept:
            kept, text = 2 * heads * max(nope + rope, dv), text.format(max(nope + rope, dv))
        return Work(
            attention_flops=2 * heads * (nope + rope + dv),
            kv_bytes=kept * self.setting.kv_dtype.itemsize,
            cached=text,
            cache_axis=axis,
        )

    def _heads(self, x: Any, count: int) -> int:
        at = x.meta["placement"]
        if not isinstance(at, Shard):
            return count
        return self.sizes.share(at, count)

    def _product_flops(self, node: fx.Node) -> int:
        """Multiplications and additions of a plain product for each token, on one rank."""
        if node.target is torch.einsum:
            equation, *operands = node.args
            shapes = [self.sizes.local(n) for n in operands]  # type: ignore[arg-type]
            terms = letters_of(str(equation), list(map(len, shapes))) or []
            sizes = {
                letter: per_token((n,))
                for letters, shape in zip(terms, shapes, strict=False)
                for letter, n in zip(letters, shape, strict=True)
            }
            return 2 * prod(sizes.values())
        if node.target in (torch.matmul, F.linear, ops.unembed):
            x = node.args[0]
            return 2 * per_token(self.sizes.local(node)) * per_token(self.sizes.local(x)[-1:])  # type: ignore[arg-type]
        return 0


def _cut_over(node: fx.Node) -> tuple[str, ...]:
    """The axes that what a node reads is cut over."""
    return tuple(dict.fromkeys(filter(None, map(axis_of, node.all_input_nodes))))


def _is_lookup(node: fx.Node) -> bool:
    """Whether rows of a table are taken by index: of it, only those are read."""
    return node.target in (F.embedding, torch.index_select) and is_param(node.args[0])
