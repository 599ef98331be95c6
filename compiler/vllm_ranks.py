"""Blocks of what is cut over the ranks, and operations over all of them.

Copied into emitted files as it stands here; it may use the names that the file imports, and what
else is copied.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)


def own_block(x: torch.Tensor, *, dim: int, units: int) -> torch.Tensor:
    """This rank's block of a value that every rank has whole."""
    ranks = get_tensor_model_parallel_world_size()
    rank = get_tensor_model_parallel_rank()
    parts = min(ranks, units)
    width = x.shape[dim] // parts
    return x.narrow(dim, rank * parts // ranks * width, width)


def own_block_loader(dim: int, units: int):
    """Loads a rank's block of a parameter, of which several ranks hold one if there are fewer."""

    def load(param: torch.Tensor, weight: torch.Tensor) -> None:
        param.data.copy_(own_block(weight, dim=dim, units=units))

    return load


def computed_loader(
    compute: Callable, dtype: torch.dtype, *, dim: int | None = None, units: int = 1
) -> Callable:
    """Loads what is computed of a parameter, element by element, or of a rank's block of it.

    One copy, of as many elements as are kept: the engine counts them to know when all is loaded.
    """

    def load(param: torch.Tensor, weight: torch.Tensor) -> None:
        own = weight if dim is None else own_block(weight, dim=dim, units=units)
        param.data.copy_(compute(own.to(dtype)).reshape(param.shape))

    return load


def whole_of_blocks(x: torch.Tensor, *, dim: int, units: int) -> torch.Tensor:
    """The whole of a value that is cut into blocks, of which several ranks may hold one."""
    ranks = get_tensor_model_parallel_world_size()
    whole = all_gathered(x, dim=dim)
    if ranks <= units:
        return whole
    return torch.cat(whole.chunk(ranks, dim)[:: ranks // units], dim)


def all_gathered(x: torch.Tensor, *, dim: int) -> torch.Tensor:
    """The parts of all ranks; whole numbers go as bits, for on a CPU vLLM sends no others."""
    if x.is_complex():
        return torch.view_as_complex(all_gathered(torch.view_as_real(x.resolve_conj()), dim=dim))
    if x.is_floating_point():
        return tensor_model_parallel_all_gather(x.contiguous(), dim=dim)
    bits = x.to(torch.int64).unsqueeze(-1).view(torch.float32)
    whole = tensor_model_parallel_all_gather(bits.contiguous(), dim=dim)
    return whole.view(torch.int64).squeeze(-1).to(x.dtype)


def numbers_summed(x: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks of whole numbers."""
    return all_gathered(x.unsqueeze(0), dim=0).sum(0, dtype=x.dtype)


def max_over_ranks(x: torch.Tensor, *, dim: int) -> torch.Tensor:
    """The largest over a dim of which each rank has a part."""
    return all_gathered(x.amax(dim, True), dim=dim).amax(dim, True)


def min_over_ranks(x: torch.Tensor, *, dim: int) -> torch.Tensor:
    """The least over a dim of which each rank has a part."""
    return all_gathered(x.amin(dim, True), dim=dim).amin(dim, True)


def rms_norm_over_ranks(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    rounds_once: bool = False,
) -> torch.Tensor:
    """Root-mean-square norm over a dim of which each rank has a part: their squares are summed."""
    wide = x.float()
    squares = tensor_model_parallel_all_reduce(wide.pow(2).sum(-1, keepdim=True).contiguous())
    count = x.shape[-1] * get_tensor_model_parallel_world_size()
    unit = wide * torch.rsqrt(squares / count + eps)
    if offset or rounds_once:
        return (unit * (offset + weight.float())).to(x.dtype)
    return (unit.to(x.dtype) * weight).to(x.dtype)


def own_values(values: list) -> list:
    """This rank's part of a list with one value a head."""
    n = len(values) // get_tensor_model_parallel_world_size()
    return values[get_tensor_model_parallel_rank() * n :][:n]
