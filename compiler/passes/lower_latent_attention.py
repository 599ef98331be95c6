"""Latent attention -> the linear that makes keys and values, and the engine's layer that has it."""

from __future__ import annotations

from torch import fx

from compiler import layers
from compiler.ir import Block, TensorType, tensor_type
from compiler.layers import Matrix
from compiler.passes.flatten_heads import in_heads
from compiler.passes.parameter_view import uses_of
from compiler.placement import Shard
from compiler.rewrite import calls_of, insert, is_param, replace_with
from funcmodels import ops
from funcmodels.errors import LoweringError

_OPERANDS = ("q_nope", "q_rope", "latent", "k_rope", "kv_up")


def lower_latent_attention(block: Block) -> Block:
    """Write the up-projection as a linear of its own, which quantisation and checkpoints know.

        o = latent_attention(q_nope, q_rope, latent, k_rope, p.kv_b)     # (num_tokens, heads, 64)
    ->
        kv = linear(latent, [p.kv_b], kind="column")
        o = reshape(latent_attention(q_nope, q_rope, latent, k_rope, kv), (-1, heads/tp, 64))
    """
    for node in calls_of(block, ops.latent_attention):
        _lower(block, node)
    return block


def _lower(block: Block, node: fx.Node) -> None:
    kwargs = dict(node.kwargs)
    given = dict(zip(_OPERANDS, node.args, strict=False))
    q_nope, q_rope, latent, k_rope, kv_up = ({**kwargs, **given}[name] for name in _OPERANDS)
    settings = {name: value for name, value in kwargs.items() if name not in _OPERANDS}
    assert isinstance(kv_up, fx.Node) and isinstance(latent, fx.Node)
    _check(block, node, kv_up)
    heads, rows, _ = tensor_type(kv_up).shape
    assert isinstance(heads, int) and isinstance(rows, int)
    (tokens, _, v_head_dim), dtype = tensor_type(node).shape, tensor_type(node).dtype
    assert isinstance(v_head_dim, int)
    at = node.meta["placement"]
    flat = Shard(1, heads, at.axis) if isinstance(at, Shard) else at
    kv = insert(
        block,
        node,
        layers.linear,
        (latent, (kv_up,), ()),
        {
            "kind": "column" if isinstance(at, Shard) else "replicated",
            "matrices": (Matrix((0, 1), (2,)),),
        },
        type=TensorType(dtype, (tokens, heads * rows)),
        placement=flat,
        name="kv",
    )
    new = insert(
        block,
        node,
        layers.latent_attention,
        (q_nope, q_rope, latent, k_rope, kv),
        settings,
        type=TensorType(dtype, (tokens, heads * v_head_dim)),
        placement=flat,
        name="attn_output",
    )
    replace_with(block, node, in_heads(block, node, new, like=node))


def _check(block: Block, node: fx.Node, kv_up: fx.Node) -> None:
    """The engine multiplies with the up-projection in its own way: it takes a layer of its own."""
    if not is_param(kv_up) or uses_of(block, kv_up) != {node}:
        raise LoweringError(
            "the up-projection of a latent attention is no parameter of its own",
            got="a value that is computed" if not is_param(kv_up) else "one that is used elsewhere",
            need='kv_up=p["..."] of P("heads nope_and_v rank"), read here alone',
            from_=node.meta["where"],
            fix="declare it so, or make keys and values yourself and call ops.attention",
        )
    if len(tensor_type(node).shape) != 3:
        raise LoweringError(
            "latent attention over several rows of each token",
            got=f"a result {tensor_type(node)}",
            need="queries (num_tokens, heads, d)",
            from_=node.meta["where"],
            fix="make keys and values yourself and call ops.attention",
        )
