"""What a partitioned program says of one rank's part, beside sizes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LocalValues:
    """A tuple of numbers, one a unit, of which each rank takes its own block."""

    values: tuple[float, ...]
    axis: str

    def at(self, rank: int, parts: int) -> tuple[float, ...]:
        n = len(self.values) // parts
        return self.values[rank * n : (rank + 1) * n]


def vocab_embed(tokens: Tensor, table: Tensor, vocab: int, axis: str) -> Tensor:
    """Rows of a vocabulary that is cut by rows: zeros for tokens of other ranks."""
    raise AssertionError("vocab_embed has no meaning outside compiler.evaluate")
