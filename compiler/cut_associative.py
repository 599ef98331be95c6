"""An associative scan on one rank: its leaves are cut as they are, or as combining leaves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx.node import map_arg

from compiler.associative import Combine, associative
from compiler.cut_recurrence import of_all_tokens, speaks, undoing, without_sequence
from compiler.placement import REPLICATE, Placement
from compiler.rules import TOKENS
from funcmodels.errors import LoweringError

if TYPE_CHECKING:
    from compiler.partition import _BlockPartitioner, _Partitioner

# How often a scan is tried with the placements that combining leaves its operands in.
_ROUNDS = 3


def cut_associative(part: _BlockPartitioner, node: fx.Node) -> None:
    """Put the local node of a scan: its leaves lie as combining leaves them, or whole.

    Raises:
        LoweringError: cut by tokens, which the engine's batches are.
    """
    if part.axis == TOKENS:
        raise LoweringError(
            "ops.associative_scan over the model's tokens",
            got="in the engine, the tokens beside each other belong to different requests",
            need="a recurrence, of which the engine keeps the state of each request",
            from_=node.meta["where"],
            fix="ops.recurrent(step, state, xs, chunked=...), with the scan inside of `chunked`",
        )
    xs: Any = node.args[0]
    found: Any = node.kwargs["combine"]
    with without_sequence(part.whole):
        local = _local(part.whole, found, tuple(of_all_tokens(part.at[x]) for x in xs))
        if local is None:
            part.whole.note_gather(part.source, node)
            local = _local(part.whole, found, (REPLICATE,) * len(xs))
            assert local is not None, "a scan of whole values needs nothing of other ranks"
    made, at = local
    placed = dict(zip(xs, at, strict=True))
    args = map_arg(node.args, lambda old: part._as(old, placed[old], node))
    kwargs: Any = {**node.kwargs, "combine": made}
    new = part.graph.create_node("call_function", associative, args, kwargs, node.name)
    part._put(node, new, at)


def _local(
    whole: _Partitioner, found: Combine, at: tuple[Placement, ...]
) -> tuple[Combine, tuple[Placement, ...]] | None:
    """Combining on one rank, and where operands and results lie.

    Operands that are left elsewhere than they were begin there. None where that does not end, or
    where combining would need something of other ranks.
    """
    for _ in range(_ROUNDS):
        count, undo = len(whole.gathered), undoing(whole)
        block, after = whole.block(found.block, (*at, *at))
        asks = speaks(block) or len(whole.gathered) > count
        if after == at and not asks:
            return Combine(block), at
        undo()
        if asks:
            return None
        at = after
    return None
