"""Where a value is along a mesh axis: whole on every rank, cut into blocks, or a sum to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Replicate:
    """Every rank has the whole value."""

    def __str__(self) -> str:
        return "replicate"


@dataclass(frozen=True)
class Shard:
    """Dim `dim` is made of `units` equal blocks, and rank r of n has those from r*units//n on.

    Where n exceeds `units`, each block lies on n/units ranks: KV heads are replicated so. `units`
    is what must not be cut: 9 heads, not the 576 columns they make up. `axis` names them.
    """

    dim: int
    units: int
    axis: str

    def __str__(self) -> str:
        return f"shard({self.dim}, {self.axis})"


@dataclass(frozen=True)
class Partial:
    """The value is the sum of what the ranks have."""

    def __str__(self) -> str:
        return "partial"


Placement: TypeAlias = Replicate | Shard | Partial

REPLICATE = Replicate()
PARTIAL = Partial()
