"""An evaluator in which layers write where the engine's kernels write: into their operands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from compiler import layers
from compiler.evaluate import RANK_FUNCTIONS
from funcmodels import ops


def add_rms_norm(
    rank: int, comm: Any, x: Tensor, residual: Tensor | None, weight: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    """vLLM's RMSNorm: with a residual both operands are overwritten, and are the results."""
    if residual is None:
        return ops.rms_norm(x, weight, **settings), x
    normed, total = layers.add_rms_norm(x, residual, weight, **settings)
    residual.copy_(total)
    x.copy_(normed)
    return x, residual


def rotary(
    rank: int, comm: Any, positions: Tensor, q: Tensor, k: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    """vLLM's rotary embedding: turns queries and keys where they are."""
    turned = layers.rotary(positions, q, k, **settings)
    for old, new in zip((q, k), turned, strict=True):
        old.copy_(new)
    return q, k


@contextlib.contextmanager
def engine_memory() -> Iterator[None]:
    """Let the evaluator's layers overwrite their operands, as the engine's do."""
    overwriting = {layers.add_rms_norm: add_rms_norm, layers.rotary: rotary}
    before = {target: RANK_FUNCTIONS.get(target) for target in overwriting}
    RANK_FUNCTIONS.update(overwriting)
    try:
        yield
    finally:
        for target, function in before.items():
            if function is None:
                del RANK_FUNCTIONS[target]
            else:
                RANK_FUNCTIONS[target] = function
