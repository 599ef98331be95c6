"""Initialisers. A parameter's values depend only on the seed and its path.

Not on the order of declaration, nor on how many devices there are, nor on the sharding: each
parameter has a generator of its own, seeded from (seed, path).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from funcmodels import tree
from funcmodels.errors import DeclarationError

if TYPE_CHECKING:
    from funcmodels.spec import Model

InitFunction: TypeAlias = Callable[[tuple[int, ...], torch.Generator], Tensor]
Initializer: TypeAlias = Literal["normal", "ones", "zeros"] | InitFunction

NAMED = ("normal", "ones", "zeros")


def check_init(init: Initializer, where: object) -> None:
    """A misspelt initialiser is found when it is declared."""
    if not callable(init) and init not in NAMED:
        raise DeclarationError(
            f"unknown initialiser {init!r}",
            need="'normal', 'ones', 'zeros', or a function of (shape, generator)",
            from_=where,
            fix="init='normal'",
        )


def normal(std: float) -> InitFunction:
    """An initialiser: normal values of mean 0 and the given standard deviation."""
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def init(
    model: Model,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Any:
    """Weights for a model: a pytree of tensors with the structure of `model.params`.

    "normal" has standard deviation 1/sqrt(fan-in); the fan-in is the last dim of the tensor as the
    checkpoint lays it out ([out, in], as Hugging Face stores linears), or the last axis.

    Args:
        seed: any integer.
        dtype: of every parameter that declares none of its own.
        device: values are drawn on the CPU in float32 and moved, so they are the same everywhere.
    """

    return tree.map_with_path(
        lambda path, _: init_one(model, path, seed=seed, dtype=dtype, device=device), model.params
    )


def init_one(
    model: Model,
    path: str,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One parameter of `init`."""
    param = model.by_path[path]
    generator = torch.Generator().manual_seed(seed_of(seed, path))
    if not isinstance(param.init, str):
        value = param.init(param.shape, generator)
    elif param.init == "normal":
        layout = model.tensor_maps[path].tensor_shape()
        value = torch.randn(param.shape, generator=generator) * (layout or (1,))[-1] ** -0.5
    else:
        value = torch.full(param.shape, 1.0 if param.init == "ones" else 0.0)
    if tuple(value.shape) != param.shape:
        raise DeclarationError(
            f"the initialiser of {path} made another shape",
            got=str(tuple(value.shape)),
            need=str(param.shape),
            from_=param.where,
            fix="return a tensor of the shape it is given",
        )
    return value.to(device=device, dtype=param.dtype or dtype)


def seed_of(seed: int, path: str) -> int:
    """A 63-bit seed from (seed, path), the same on every platform and version."""
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
