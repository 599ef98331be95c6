"""rope and attention on heads -> the same on flat (num_tokens, features) tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
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
    with reshapes around each, which `cancel_reshapes` takes away between them.
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
        replace_with(block, user, _heads(block, user, part, like=user))
    block.graph.erase_node(node)


def _flatten_attention(block: Block, node: fx.Node) -> None:
    q, k, v = node.args[:3]
    if any(len(tensor_type(n).shape) != 3 for n in (q, k, v)):  # type: ignore[arg-type]
        return
    _, heads, head_dim = tensor_type(q).shape  # type: ignore[arg-type]
    _, kv_heads, v_head_dim = tensor_type(v).shape  # type: ignore[arg-type]
    flat = tuple(_flat(block, node, n) for n in (q, k, v))  # type: ignore[arg-type]
    settings = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "v_head_dim": v_head_dim,
    }
    dtype, (tokens, _, _) = tensor_type(node).dtype, tensor_type(node).shape
    at = node.meta["placement"]
    new = insert(
        block,
        node,
        layers.attention,
        flat,
        {**settings, **node.kwargs},
        type=TensorType(dtype, (tokens, heads * v_head_dim)),  # type: ignore[operator]
        placement=Shard(1, at.units, at.axis) if isinstance(at, Shard) else at,
        name="attn_output",
    )
    replace_with(block, node, _heads(block, node, new, like=node))


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


def _heads(block: Block, before: fx.Node, x: fx.Node, like: fx.Node) -> fx.Node:
    """(num_tokens, heads*d) as (num_tokens, heads, d)."""
    _, heads, d = tensor_type(like).shape
    at = like.meta["placement"]
    return insert(block, before, torch.reshape, (x, (-1, _local(heads, at), d)), like=like)


def _local(size: Any, at: Any) -> Any:
    return LocalSize(at.units, size // at.units, at.axis, "tp") if isinstance(at, Shard) else size
