"""Linear layers, cut along their outputs or along their inputs."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcmodels.errors import ShapeError
from funcmodels.nn.layer import ParallelLayer
from funcmodels.nn.ranks import Mesh, vary_over


class ColumnParallelLinear(ParallelLayer):
    """y = x Wᵀ + b, each rank with some of the outputs.

    Weights are drawn as normal values of standard deviation in_features**-0.5; biases are zeros.

    Args:
        in_features, out_features: of the whole layer.
        bias: whether there is one; it is cut too.
        mesh: a DeviceMesh with a dim "tp", or a process group, that divides out_features.
        gather_output: return all outputs on every rank.
        dtype, device: of the parameters; "meta" allocates nothing.
    Shapes:
        x (..., in_features), the same on all ranks -> (..., out_features / ranks), or
        (..., out_features) if gathered. Weight (out_features / ranks, in_features).
    Raises:
        ShardingError: the ranks do not divide out_features, or the mesh has no dim "tp".
    Source: Shoeybi et al. 2019, arXiv:1909.08053.
    """

    cuts: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0}

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        mesh: Mesh = None,
        gather_output: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(mesh)
        self.in_features, self.out_features = in_features, out_features
        self.gather_output = gather_output
        self.divided("out_features", out_features)
        _declare(self, bias, dtype, device)

    def reset_parameters(self) -> None:
        _draw(self)

    def forward(self, x: Tensor) -> Tensor:
        _check(self, x, self.in_features)
        y = F.linear(vary_over(self.ranks, x), self.weight, self.bias)
        if self.ranks is None or not self.gather_output:
            return y
        (y,) = self.ranks.call("all_gather", [y], y.ndim - 1, self.ranks.size)
        return y


class RowParallelLinear(ParallelLayer):
    """y = x Wᵀ + b, each rank with some of the inputs; the products are summed over the ranks.

    Weights are drawn as normal values of standard deviation in_features**-0.5; biases are zeros.

    Args:
        in_features, out_features: of the whole layer.
        bias: whether there is one; it is whole on each rank, and added once.
        mesh: a DeviceMesh with a dim "tp", or a process group, that divides in_features.
        input_is_parallel: x is what a column-parallel layer returned. Else x is whole, and each
            rank takes its part.
        dtype, device: of the parameters; "meta" allocates nothing.
    Shapes:
        x (..., in_features / ranks), or (..., in_features) if not parallel -> (..., out_features),
        the same on all ranks. Weight (out_features, in_features / ranks).
    Raises:
        ShardingError: the ranks do not divide in_features, or the mesh has no dim "tp".
    Source: Shoeybi et al. 2019, arXiv:1909.08053.
    """

    cuts: ClassVar[dict[str, int]] = {"weight": 1}

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        mesh: Mesh = None,
        input_is_parallel: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(mesh)
        self.in_features, self.out_features = in_features, out_features
        self.input_is_parallel = input_is_parallel
        self.divided("in_features", in_features)
        _declare(self, bias, dtype, device)

    def reset_parameters(self) -> None:
        _draw(self)

    def forward(self, x: Tensor) -> Tensor:
        _check(self, x, self.in_features // (self.size if self.input_is_parallel else 1))
        if self.ranks is not None and not self.input_is_parallel:
            (x,) = self.ranks.call("take_block", [x], x.ndim - 1, self.ranks.size)
        y = F.linear(x, self.weight)
        if self.ranks is not None:
            (y,) = self.ranks.call("all_reduce", [y])
        return y if self.bias is None else y + self.bias


Linear = ColumnParallelLinear | RowParallelLinear


def _declare(
    layer: Linear, bias: bool, dtype: torch.dtype | None, device: torch.device | str | None
) -> None:
    layer.declare("weight", (layer.out_features, layer.in_features), dtype, device)
    if bias:
        layer.declare("bias", (layer.out_features,), dtype, device)
    else:
        layer.register_parameter("bias", None)
    layer.reset_parameters()


def _draw(layer: Linear) -> None:
    layer.draw("weight", layer.in_features**-0.5)
    if layer.bias is not None:  # the same on all ranks, whatever their seeds
        nn.init.zeros_(layer.bias)


def _check(layer: Linear, x: Tensor, width: int) -> None:
    """x has the features of this rank's weight."""
    if x.shape[-1] == width:
        return
    got = x.shape[-1]
    fix = f"x with {width} features"
    if isinstance(layer, RowParallelLinear) and layer.size > 1:
        if got == layer.in_features:
            fix = "input_is_parallel=False, or x from a ColumnParallelLinear"
        elif got * layer.size == layer.in_features:
            fix = "input_is_parallel=True: x is a part already"
    elif got * layer.size == layer.in_features:
        fix = "gather_output=True in the layer that x comes from, or a RowParallelLinear here"
    raise ShapeError(
        f"{type(layer).__name__}: x does not have the features of the weight",
        got=f"x {tuple(x.shape)}, rank {layer.rank} of {layer.size}",
        need=f"(..., {width}): in_features={layer.in_features}"
        + (f" over {layer.size} ranks" if width != layer.in_features else ", whole"),
        fix=fix,
    )
