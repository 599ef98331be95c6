"""Whether a recorded step treats each sequence by itself, tried where no sharding rule tells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiler.evaluate import run_block
from compiler.ir import Block, Program, Sym, TensorType
from funcmodels.in_float64 import in_float64, wide

COUNT = 3  # sequences
TOLERANCE = (
    1e-9  # of the largest element: kernels may round otherwise for one matrix than for three
)


def sequences_apart(program: Program, step: Block) -> bool:
    """Whether a sequence's results are the same alone and among others, of random numbers.

    Args:
        step: of one token of each of some sequences, which are the first dim.
    Returns:
        False too where it fails on such numbers.
    """
    generator = torch.Generator().manual_seed(0)
    types: list[TensorType] = [node.meta["type"] for node in step.inputs]
    values = [_random(type_, generator) for type_ in types]
    try:
        together = _run(program, step, values)
        for i in range(COUNT):
            one = [
                value[i : i + 1] if _is_of_sequences(type_) else value
                for type_, value in zip(types, values, strict=True)
            ]
            alone = _run(program, step, one)
            if not all(_equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True)):
                return False
    except RuntimeError:
        return False
    return True


def _run(program: Program, step: Block, values: list[Tensor]) -> list[Tensor]:
    count = values[0].shape[0]
    with torch.no_grad(), in_float64():
        return run_block(program, step, values, {"num_tokens": count}, torch.float64)


def _is_of_sequences(type_: TensorType) -> bool:
    return bool(type_.shape) and isinstance(type_.shape[0], Sym)


def _random(type_: TensorType, generator: torch.Generator) -> Tensor:
    shape: Any = [COUNT if isinstance(n, Sym) else n for n in type_.shape]
    dtype = wide(type_.dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=dtype)
    return torch.randint(2, shape, generator=generator).to(dtype)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    scale = a.abs().double().nan_to_num().max().clamp(min=1).item() if a.numel() else 1.0
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE * scale, equal_nan=True)
