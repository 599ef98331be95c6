"""Rotary position embedding as a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from funcmodels import ops
from funcmodels.nn.layer import ParallelLayer


class RotaryEmbedding(ParallelLayer):
    """`ops.rope` with its settings. It has no parameters: ranks rotate the heads they have.

    Args:
        head_dim: features of a head.
        theta: base of the frequencies; no default, since models differ.
        scaling, rotary_dim, interleaved, max_position: see `ops.rope`.
    Shapes:
        q (..., seq, heads, head_dim), k (..., seq, kv_heads, head_dim), positions (..., seq) ->
        q and k, rotated.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float,
        scaling: Mapping[str, Any] | None = None,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        max_position: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.settings = {
            "theta": theta,
            "scaling": None if scaling is None else dict(scaling),
            "rotary_dim": rotary_dim,
            "interleaved": interleaved,
            "max_position": max_position,
        }

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rope(q, k, positions, **self.settings)

    def extra_repr(self) -> str:
        given = {n: v for n, v in self.settings.items() if v not in (None, False)}
        return ", ".join([str(self.head_dim), *(f"{n}={v}" for n, v in given.items())])
