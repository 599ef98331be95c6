"""`ops.associative_scan` over tokens as one node: what it combines by is a block of its own.

A node `associative(xs, combine=..., dim=...)` has the leaves of xs as a tuple, and is the tuple of
their running results. The block takes the leaves of the first operand, then those of the second,
of any number of tokens, and returns those of their combination.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compiler.ir import Block
from funcmodels.ops import associative_scan

if TYPE_CHECKING:
    from compiler.run_recurrence import Evaluator


@dataclass(frozen=True, eq=False)
class Combine:
    """What a node combines by."""

    block: Block

    def __repr__(self) -> str:  # in printed graphs
        return f"<{self.block.name}>"


def associative(xs: tuple[Tensor, ...], *, combine: Combine, dim: int) -> tuple[Tensor, ...]:
    """The running results."""
    raise AssertionError("an associative scan is carried out by compiler.evaluate")


def run_associative(
    evaluator: Evaluator, block: Block, xs: list[list[Tensor]], dim: int
) -> list[list[Tensor]]:
    """The running results: one list of ranks for each leaf.

    Args:
        xs: a list of ranks for each leaf.
    """
    names = ("num_tokens",) if dim == 0 else ("batch", "seq")

    def combine(first: Any, second: Any) -> list[list[Tensor]]:
        sizes: dict[str, int] = dict(zip(names, first[0][0].shape, strict=False))
        results = evaluator.with_sizes(sizes).block(block, {}, [*first, *second])
        return [list(ranks) for ranks in results]

    return associative_scan(combine, [list(ranks) for ranks in xs], dim=dim)


def on_combine(block: Block, fn: Callable[[Block], Block]) -> Block:
    """A block of its own, with `fn` applied to what its scans combine by."""
    for node in block.graph.nodes:
        if node.target is associative:
            found: Any = node.kwargs["combine"]
            made: Any = replace(found, block=fn(found.block))
            node.kwargs = {**node.kwargs, "combine": made}
    return block
