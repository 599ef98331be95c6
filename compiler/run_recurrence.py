"""A recorded recurrence, run by the reference evaluator on all ranks in lock step."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from compiler.comm import Comm
from compiler.ir import MODEL_DTYPE, Block, LocalSize
from compiler.placement import Shard
from compiler.recurrence import Recurrence
from funcmodels import tree
from funcmodels.ops.recurrent import Carry, given, scan
from funcmodels.remat import remat
from funcmodels.state import Slot, State


class Evaluator(Protocol):
    """What runs blocks: a list of one value a rank for each input and result."""

    @property
    def comm(self) -> Comm: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def block(self, block: Block, weights: Any, inputs: list[list[Any]]) -> list[list[Tensor]]: ...

    def with_sizes(self, sizes: dict[str, int]) -> Evaluator: ...


def run_recurrence(
    evaluator: Evaluator,
    found: Recurrence,
    xs: list[list[Tensor]],
    params: list[list[Tensor]],
    segment_ids: Tensor | None,
) -> list[list[Tensor]]:
    """The results: one list of ranks for each leaf of y.

    Args:
        xs, params: a list of ranks for each leaf.
        segment_ids: (*batch, seq), or None.
    """
    ranks = evaluator.comm.ranks
    names = [name for name, _ in found.slots]
    state = _of_ranks(found, evaluator)
    is_flat = not found.seq_dims

    def on(
        block: Block, carry: Carry, x: Any, params: Any, sizes: dict[str, int]
    ) -> tuple[Carry, Any]:
        inputs = [[carry[f"{name}.{rank}"] for rank in ranks] for name in names]
        out = evaluator.with_sizes(sizes).block(block, {}, [*inputs, *x, *params])
        after = {
            f"{name}.{rank}": value
            for name, values in zip(names, out, strict=False)
            for rank, value in zip(ranks, values, strict=True)
        }
        return after, out[len(names) :]

    def step(carry: Carry, x: Any, params: Any) -> tuple[Carry, Any]:
        if not is_flat:
            return on(found.step, carry, x, params, {"batch": x[0][0].shape[0]})
        carry, x = tree.map(lambda t: t.unsqueeze(0), (carry, x))
        after, y = on(found.step, carry, x, params, {"num_tokens": 1})
        return tree.map(lambda t: t.squeeze(0), (after, y))

    def chunked(carry: Carry, x: Any, params: Any) -> tuple[Carry, Any]:
        assert found.chunked is not None
        some = x[0][0].shape
        sizes = {"num_tokens": some[0]} if is_flat else {"batch": some[0], "seq": some[1]}
        return on(found.chunked, carry, x, params, sizes)

    form = remat(chunked) if found.remat else chunked
    form = None if found.chunked is None else given(form, params)
    return scan(given(step, params), form, state, xs, found.seq_dims, found.chunk, segment_ids)


def _of_ranks(found: Recurrence, evaluator: Evaluator) -> State:
    """The parts of a state that the ranks hold, each a tensor of a state of their own."""
    slots = {}
    for i, (name, slot) in enumerate(found.slots):
        shape = list(slot.shape)
        at = found.placements[i] if found.placements else None
        if isinstance(at, Shard):
            inner = shape[at.dim] // at.units
            shape[at.dim] = LocalSize(at.units, inner, at.axis, "tp").at(evaluator.comm.size)
        dtype = evaluator.dtype if slot.dtype is MODEL_DTYPE else slot.dtype
        for rank in evaluator.comm.ranks:
            slots[f"{name}.{rank}"] = Slot(slot.axes, tuple(shape), dtype, slot.init)
    return State(slots, found.state.where)
