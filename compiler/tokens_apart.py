"""Whether a served model keeps tokens apart: the engine's batch holds those of many requests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from compiler import collectives
from compiler.ir import Program, Sym, target_name
from compiler.partition import partition
from compiler.placement import Shard
from compiler.rules import RULES, TOKENS
from funcmodels.errors import LoweringError
from funcmodels.source import SourceLine


def check_tokens_apart(program: Program) -> None:
    """Refuse a program whose tokens depend on each other otherwise than through attention.

    The engine's batch holds tokens of many requests, and when decoding, one of each; only
    attention finds a request's earlier tokens there, in the KV cache. A mean over the sequence
    would be taken over strangers, without an error. The check is the sharding rules' own: cut the
    batch by tokens, and nothing may need a collective.

    Raises:
        LoweringError: names the operation and the user's line.
    """
    local = partition(program, TOKENS)
    known = {target_name(target) for target in RULES}
    for found in local.gathered:
        if found.operation in known:
            raise _mixing(found.operation, found.where)
        raise LoweringError(
            f"{found.operation} is not known to leave tokens apart",
            need="operations with a sharding rule, for tokens that belong to different requests",
            from_=found.where,
            fix="write it with torch functions that have one, or with ops.attention",
        )
    for block in local.all():
        for node in block.graph.nodes:
            if node.op == "call_function" and node.target not in _TAKE_SIZES and _reads_count(node):
                raise LoweringError(
                    f"{target_name(node.target)} computes with the number of tokens",
                    got="in the engine, that is the size of a batch of many requests",
                    need="values that do not depend on what else is in the batch",
                    from_=node.meta["where"],
                    fix="a config field, or `positions` for what depends on the place",
                )
            mixing = node.target in collectives.ALL and node.target is not collectives.vary
            if node.op == "call_function" and mixing:
                raise _mixes(node)
    results = [n.meta.get("placement") for n in local.root.results]
    if not all(isinstance(at, Shard) and at.dim == 0 for at in results):
        raise _mixes(local.root.results[0])


# Where a number of tokens is a size, not a value.
_TAKE_SIZES = (torch.reshape, Tensor.expand, torch.zeros, torch.ones, torch.full, Tensor.new_zeros,
               Tensor.new_ones, Tensor.new_full, *collectives.ALL)  # fmt: skip


def _reads_count(node: fx.Node) -> bool:
    """Whether the number of tokens is among a node's arguments."""
    found = []
    map_aggregate((node.args, node.kwargs), lambda a: found.append(isinstance(a, Sym)))
    return any(found)


def _mixes(node: fx.Node) -> LoweringError:
    shown: Any = node.args[0] if node.target is collectives.all_reduce else node
    while shown.target in collectives.ALL and shown.users:
        shown = next(iter(shown.users))
    if shown.op != "call_function":
        shown = node.all_input_nodes[0] if node.args else node
    return _mixing(target_name(shown.target), node.meta["where"])


def _mixing(operation: str, where: SourceLine) -> LoweringError:
    return LoweringError(
        f"{operation} makes tokens depend on each other, or on where they are in the batch",
        got="in the engine, the tokens beside each other belong to different requests",
        need="token-wise operations; ops.attention and ops.recurrent alone see others",
        from_=where,
        fix="use these, ops.short_conv for the last few tokens, and `positions` for the place",
    )
