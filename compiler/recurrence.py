"""A recurrence as one node of the graph: its step and its chunked form are blocks of their own.

A node `recurrence(xs, params, segment_ids, recurrence=...)` has the leaves of xs and of params as
tuples, and is the tuple of the leaves of y. The blocks take the leaves of the state, of x and of
params, in this order, and return those of the state, then those of y.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from compiler.ir import Block, Sym
from compiler.placement import REPLICATE, Placement, Shard
from funcmodels.state import Slot, State


@dataclass(frozen=True, eq=False)
class Recurrence:
    """What a node runs.

    Args:
        step: of one token of each of `num_tokens` sequences: leaves (num_tokens, ...).
        chunked: of `num_tokens` tokens of one sequence: a state without a batch dim; or None.
        state: as declared, whole.
        chunk: the most tokens that `chunked` is given while training.
        kernel: what the engine has for it, of `compiler.recurrent_kernels`; or None.
        remat: whether training computes again within chunks, and keeps the states between them.
        placements: of the state's tensors, in order, once it is partitioned.
    """

    step: Block
    chunked: Block | None
    state: State
    chunk: int
    kernel: str | None = None
    placements: tuple[Placement, ...] = ()
    remat: bool = False

    @property
    def slots(self) -> list[tuple[str, Slot]]:
        return list(self.state.slots.items())

    def lead(self, block: Block) -> int:
        """How many dims of the state of a block come before those declared."""
        declared = len(self.slots[0][1].shape)
        return len(block.inputs[0].meta["type"].shape) - declared

    @property
    def seq_dims(self) -> int:
        """How many dims a step's x has less than the node's: the sequence, where rows have one."""
        return 0 if Sym("num_tokens") in self.step.inputs[0].meta["type"].shape else 1

    def __repr__(self) -> str:  # in printed graphs
        return f"<{self.step.name}>"


def recurrence(
    xs: tuple[Tensor, ...],
    params: tuple[Tensor, ...],
    segment_ids: Tensor | None,
    *,
    recurrence: Recurrence,
) -> tuple[Tensor, ...]:
    """The results of all tokens."""
    raise AssertionError("a recurrence is carried out by compiler.evaluate")


def blocks_within(block: Block) -> Iterator[Block]:
    """What runs within a block and is no module: steps, chunked forms, what scans combine by."""
    for node in block.graph.nodes:
        for found in node.kwargs.values():
            inner = (getattr(found, name, None) for name in ("step", "chunked", "block"))
            for one in inner:
                if isinstance(one, Block):
                    yield one
                    yield from blocks_within(one)


def slot_placement(slot: Slot, table: Mapping[str, str | None], axis: str) -> Placement:
    """Where a tensor of a state lies, its dims counted without the batch's."""
    for dim, (name, size) in enumerate(zip(slot.axes, slot.shape, strict=True)):
        if table.get(name) == axis:
            return Shard(dim, size, name)
    return REPLICATE


def moved(at: Placement, dims: int) -> Placement:
    """The placement with `dims` dims more before the others."""
    return Shard(at.dim + dims, at.units, at.axis) if isinstance(at, Shard) else at
