"""What one rank holds of a value or a parameter, and its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from compiler import layers
from compiler.check import padded
from compiler.ir import MODEL_DTYPE, LocalSize, Sym, TensorType
from compiler.placement import Shard

VOCAB_LAYERS = (layers.vocab_embedding, layers.logits)


@dataclass(frozen=True)
class Setting:
    """What a model is explained for: ranks, stages, and dtypes of weights and KV cache."""

    tp: int
    pp: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    ep: int = 1


class Sizes:
    """Sizes on one rank of a setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def local(self, node: fx.Node, i: int = 0) -> tuple[Any, ...]:
        """The shape of a value on one rank; of a tuple, that of one of its parts."""
        type_, at = node.meta["type"], node.meta["placement"]
        if not isinstance(type_, TensorType):
            type_, at = type_[i], at[i] if isinstance(at, tuple) else at
        shape = list(type_.shape)
        if isinstance(at, Shard) and isinstance(size := shape[at.dim], int):
            shape[at.dim] = self.share(at, size)
        return tuple(shape)

    def share(self, at: Shard, size: int) -> int:
        """What a rank has of a size that is cut into blocks."""
        return LocalSize(at.units, size // at.units, at.axis, "tp").at(self.setting.tp)

    def itemsize(self, dtype: torch.dtype) -> int:
        return (self.setting.dtype if dtype == MODEL_DTYPE else dtype).itemsize

    def bytes(self, node: fx.Node) -> int:
        """Bytes of a whole value for each token."""
        type_: TensorType = node.meta["type"]
        return per_token(type_.shape) * self.itemsize(type_.dtype)

    def param_shape(self, node: fx.Node, layer: bool) -> tuple[int, ...]:
        """What a rank holds of a parameter; of a vocabulary, with the rows of padding."""
        shape = self.local(node)
        if layer and self.setting.ep > 1 and any(u.target is layers.experts for u in node.users):
            count, *rest = node.meta["type"].shape
            return (-(-count // self.setting.ep), *rest)
        if layer and all(user.target in VOCAB_LAYERS for user in node.users):
            shape = (padded(node.meta["type"].shape[0]) // self.setting.tp, *shape[1:])
        return shape


def per_token(shape: tuple[Any, ...]) -> int:
    """The elements of a shape for each token."""
    return prod(n.at({"num_tokens": 1}) if isinstance(n, Sym) else int(n) for n in shape)


def axis_of(node: Any) -> str:
    """The axis that a value is cut over, or ""."""
    at = node.meta.get("placement")
    return at.axis if isinstance(at, Shard) else ""
