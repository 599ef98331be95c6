"""rope and attention on heads -> the same on flat (num_tokens, features) tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from compiler import layers
from compiler.ir import Block, LocalSize, TensorType, tensor_type
from compiler.placement import Shard
from compiler.rewrite import calls_of, insert, replace_with
from funcmodels import ops


def flatten_heads(block: Block) -> Block:
    """Let rope and attention take flat tensors, the only form the engine's kernels agree on.

        q2, k2 = rope(q, k, positions); o = attention(q2, k2, v)      # (num_tokens, heads, 64)
    ->
        q2, k2 = rotary(positions, flat(q), flat(k)); o = attention(q2, k2, flat(v))
                                                                     # (num_tokens, heads*64)
    with reshapes around each, which `cancel_reshapes` takes away between them. Where values are
    not as wide as keys, the narrower are padded with zeros, and the output is cut.
    """
    for node in calls_of(block, ops.rope):
        _flatten_rope(block, node)
    for node in calls_of(block, ops.attention):
        _flatten_attention(block, node)
    return block


def _flatten_rope(block: Block, node: fx.Node) -> None:
    q, k, positions = node.args[:3]
    if any(len(tensor_type(n).shape) != 3 for n in (q, k)):  # type: ignore[arg-type]
        return
    flat_q, flat_k = (_flat(block, node, n) for n in (q, k))  # type: ignore[arg-type]
    head_dim = tensor_type(q).shape[2]  # type: ignore[arg-type]
    types = (tensor_type(flat_q), tensor_type(flat_k))
    placements = (flat_q.meta["placement"], flat_k.meta["placement"])
    new = insert(
        block,
        node,
        layers.rotary,
        (positions, flat_q, flat_k),
        {"head_dim": head_dim, **node.kwargs},
        type=types,
        placement=placements,
        name="rotary",
    )
    for user in list(node.users):
        i = user.args[1]
        assert user.target is operator.getitem and isinstance(i, int)
        part = insert(
            block,
            user,
            operator.getitem,
            (new, i),
            type=types[i],
            placement=placements[i],
            like=user,
            name=user.name,
        )
        replace_with(block, user, in_heads(block, user, part, like=user))
    block.graph.erase_node(node)


def _flatten_attention(block: Block, node: fx.Node) -> None:
    q, k, v = node.args[:3]
    if any(len(tensor_type(n).shape) != 3 for n in (q, k, v)):  # type: ignore[arg-type]
        return
    _, heads, head_dim = tensor_type(q).shape  # type: ignore[arg-type]
    _, kv_heads, v_head_dim = tensor_type(v).shape  # type: ignore[arg-type]
    wide = max(head_dim, v_head_dim)  # type: ignore[type-var]
    flat = tuple(_flat(block, node, _padded(block, node, n, wide)) for n in (q, k, v))
    settings: dict[str, Any] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": wide,
        "v_head_dim": wide,
    }
    settings |= node.kwargs
    if wide != head_dim and settings.get("scale") is None:
        settings["scale"] = head_dim**-0.5  # type: ignore[operator]
    dtype, (tokens, _, _) = tensor_type(node).dtype, tensor_type(node).shape
    at = node.meta["placement"]
    new = insert(
        block,
        node,
        layers.attention,
        flat,
        settings,
        type=TensorType(dtype, (tokens, heads * wide)),  # type: ignore[operator]
        placement=Shard(1, at.units, at.axis) if isinstance(at, Shard) else at,
        name="attn_output",
    )
    out = in_heads(block, node, new, like=node, head_dim=wide)
    if wide != v_head_dim:
        cut = (Ellipsis, slice(None, v_head_dim))
        out = insert(block, node, operator.getitem, (out, cut), like=node)
    replace_with(block, node, out)


def _padded(block: Block, before: fx.Node, x: Any, wide: Any) -> fx.Node:
    """Zeros after each head: the engine's caches hold keys and values of one width."""
    tokens, heads, d = tensor_type(x).shape
    if d == wide:
        return x
    kind = TensorType(tensor_type(x).dtype, (tokens, heads, wide))
    return insert(block, before, F.pad, (x, (0, wide - d)), type=kind, like=x)


def _flat(block: Block, before: fx.Node, x: fx.Node) -> fx.Node:
    """(num_tokens, heads, d) as (num_tokens, heads*d)."""
    tokens, heads, d = tensor_type(x).shape
    at = x.meta["placement"]
    kind = TensorType(tensor_type(x).dtype, (tokens, heads * d))  # type: ignore[operator]
    flat_at = Shard(1, at.units, at.axis) if isinstance(at, Shard) else at
    return insert(
        block,
        before,
        torch.reshape,
        (x, (-1, _local(heads * d, at))),  # type: ignore[operator]
        type=kind,
        placement=flat_at,
        like=x,
    )


def in_heads(
    block: Block, before: fx.Node, x: fx.Node, like: fx.Node, head_dim: int | None = None
) -> fx.Node:
    """(num_tokens, heads*d) as (num_tokens, heads, d); d is that of `like` unless given."""
    tokens, heads, d = tensor_type(like).shape
    at, d = like.meta["placement"], head_dim or d
    kind = TensorType(tensor_type(like).dtype, (tokens, heads, d))
    shape = (-1, _local(heads, at), d)
    return insert(block, before, torch.reshape, (x, shape), type=kind, like=like)


def _local(size: Any, at: Any) -> Any:
    return LocalSize(at.units, size // at.units, at.axis, "tp") if isinstance(at, Shard) else size
