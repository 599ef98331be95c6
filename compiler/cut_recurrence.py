"""A recurrence on one rank: its step and its chunked form, cut as their operands are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx.node import map_arg

from compiler import collectives
from compiler.ir import Block, target_name
from compiler.placement import REPLICATE, Partial, Placement, Shard
from compiler.recurrence import Recurrence, moved, recurrence, slot_placement
from compiler.recurrent_kernels import kernel_of
from compiler.rules import RULES, TOKENS
from compiler.sequence import is_by_sequence
from compiler.sequences_apart import sequences_apart
from funcmodels.errors import LoweringError
from funcmodels.source import SourceLine
from funcmodels.state import Slot

if TYPE_CHECKING:
    from compiler.partition import _BlockPartitioner, _Partitioner

# How often a recurrence is tried with the placements that its step has left its state in.
_ROUNDS = 3


def cut_recurrence(part: _BlockPartitioner, node: fx.Node) -> None:
    """Put the local node of a recurrence, or, where it cannot be cut, one of whole values.

    Raises:
        LoweringError: cut by tokens, a step that does not treat each sequence by itself.
    """
    found: Recurrence = node.kwargs["recurrence"]  # type: ignore[assignment]
    if part.axis == TOKENS:
        _by_tokens(part, node, found)
        return
    xs: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    params: Sequence[fx.Node] = node.args[1]  # type: ignore[assignment]
    at: dict[fx.Node, Placement] = {n: of_all_tokens(part.at[n]) for n in (*xs, *params)}
    table = part.whole.source.model.table
    declared = tuple(slot_placement(slot, table, part.axis) for _, slot in found.slots)
    alike = tuple(_as_one_of(slot, at) for _, slot in found.slots)

    def cut(state: tuple[Placement, ...]) -> tuple[Recurrence, tuple[Placement, ...]] | None:
        lie = (tuple(at[n] for n in nodes) for nodes in (xs, params))
        with without_sequence(part.whole):
            return _local(part.whole, found, state, *lie)

    local = cut(declared) or cut(alike)
    if local is None:
        part.whole.note_gather(part.source, node)
        at = dict.fromkeys(at, REPLICATE)
        local = cut((REPLICATE,) * len(declared))
        assert local is not None, "a recurrence of whole values needs nothing of other ranks"
    made, results = local
    if isinstance(node.args[2], fx.Node):
        at[node.args[2]] = part.at[node.args[2]]
    args = map_arg(node.args, lambda old: part._as(old, at[old], node))
    _put(part, node, args, made, results)


def of_all_tokens(at: Placement) -> Placement:
    """A recurrence goes through all tokens: where ranks have a part of them, they are gathered."""
    return REPLICATE if isinstance(at, Partial) or is_by_sequence(at) else at


def undoing(whole: _Partitioner) -> Callable[[], None]:
    """What takes back all that is partitioned from here on."""
    done, needs, count = dict(whole.done), dict(whole.needs), len(whole.gathered)

    def undo() -> None:
        whole.done, whole.needs = done, needs
        del whole.gathered[count:]

    return undo


@contextmanager
def without_sequence(whole: _Partitioner) -> Iterator[None]:
    """Within a step, tokens are not cut."""
    before, whole.sequence = whole.sequence, False
    try:
        yield
    finally:
        whole.sequence = before


def _as_one_of(slot: Slot, at: dict[fx.Node, Placement]) -> Placement:
    """The cut of an operand, of a state that has a dim of the size that is cut there.

    A guess to be tried, where the table does not know the state's axes: what is begun with one
    value everywhere may be cut in any way that its step keeps.
    """
    for x, cut in at.items():
        if isinstance(cut, Shard):
            size = x.meta["type"].shape[cut.dim]
            if size in slot.shape:
                return Shard(slot.shape.index(size), cut.units, cut.axis)
    return REPLICATE


def _local(
    whole: _Partitioner,
    found: Recurrence,
    state: tuple[Placement, ...],
    xs: tuple[Placement, ...],
    params: tuple[Placement, ...],
) -> tuple[Recurrence, tuple[Placement, ...]] | None:
    """A recurrence on one rank, and where its results lie.

    A state that its step leaves otherwise than it was is begun as the step leaves it. None where
    that does not end, or where a step would need something of other ranks.
    """
    for _ in range(_ROUNDS):
        count, undo = len(whole.gathered), undoing(whole)
        local: list[Block] = []
        after, results = state, ()
        for block in filter(None, (found.step, found.chunked)):
            lead, seq = found.lead(block), found.seq_dims if block is found.step else 0
            given = [*(moved(at, lead) for at in state), *(moved(at, -seq) for at in xs), *params]
            made, out = whole.block(block, tuple(given))
            local.append(made)
            after = tuple(moved(at, -lead) for at in out[: len(state)])
            results = tuple(moved(at, seq) for at in out[len(state) :])
            if after != state:
                break
        asks = len(whole.gathered) > count or any(map(speaks, local))
        if after == state and not asks:
            for (name, _), at in zip(found.slots, state, strict=True):
                if isinstance(at, Shard):
                    where, of = found.state.where, f'the state "{name}"'
                    whole.need(at.axis, at.units, True, f"{of} is sharded", where, of)
            step, chunked = (*local, None)[:2]
            assert step is not None
            kernel = kernel_of(found, state, xs, params)
            made = replace(found, step=step, chunked=chunked, kernel=kernel, placements=state)
            return made, results
        undo()
        if asks:
            return None
        state = after
    return None


def _by_tokens(part: _BlockPartitioner, node: fx.Node, found: Recurrence) -> None:
    """The engine keeps a state for each request: a step must treat each sequence by itself.

    The sharding rules tell; of an operation that has none, it is tried.
    """
    by_token = Shard(0, 2, TOKENS)
    xs: Any = node.args[0]
    params: Any = node.args[1]
    count = len(found.slots) + len(xs)
    before, undo = len(part.whole.gathered), undoing(part.whole)
    made, results = part.whole.block(found.step, ((by_token,) * count + (REPLICATE,) * len(params)))
    if any(at != by_token for at in results) or speaks(made):
        known = {target_name(target) for target in RULES}
        unknown = [g for g in part.whole.gathered[before:] if g.operation not in known]
        if not unknown:
            raise _depends(found, *_first_said(made, node))
        if not sequences_apart(part.whole.source, found.step):
            raise _not_known(found, unknown[0].operation, unknown[0].where)
        undo()
        results = (by_token,) * len(results)
    args = map_arg(node.args, lambda old: part.env[old])
    _put(part, node, args, found, results[len(found.slots) :])


def _first_said(made: Block, node: fx.Node) -> tuple[str, SourceLine]:
    """The operation for which a block first needs something of others, and its line."""
    for said in made.graph.nodes:
        if said.target in _SPEAKING:
            asked = [said.args[0], *said.users]
            shown = asked[0] if said.target is collectives.all_reduce else asked[-1]
            return target_name(shown.target), said.meta["where"]
    return "what it returns", node.meta["where"]


def _depends(found: Recurrence, operation: str, where: SourceLine) -> LoweringError:
    return LoweringError(
        f"the step {found.step.name} makes sequences depend on each other: {operation}",
        got="in the engine, its leading dim holds one token of each of many requests",
        need="a step of each sequence by itself",
        from_=where,
        fix="reduce over the dims of a token alone, which are the last ones",
    )


def _not_known(found: Recurrence, operation: str, where: SourceLine) -> LoweringError:
    return LoweringError(
        f"{operation} in the step {found.step.name} is not known to treat each sequence by itself",
        got="it has no sharding rule, and tried on random numbers, a sequence's result depends "
        "on others, or it fails",
        need="a step of each sequence by itself: in the engine, its leading dim holds one token "
        "of each of many requests",
        from_=where,
        fix="write it with torch functions that have a rule, over the dims of a token alone",
    )


def _put(part: _BlockPartitioner, node: fx.Node, args: Any, made: Recurrence, at: Any) -> None:
    kwargs: Any = {"recurrence": made}
    part._put(
        node, part.graph.create_node("call_function", recurrence, args, kwargs, node.name), at
    )


_SPEAKING = set(collectives.ALL) - {collectives.vary, collectives.replica_sum}


def speaks(block: Block) -> bool:
    """Whether a block sends something to other ranks."""
    return any(node.target in _SPEAKING for node in block.graph.nodes)
