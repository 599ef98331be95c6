"""Norms over the last dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from funcmodels import ops
from funcmodels.nn.layer import ParallelLayer
from funcmodels.nn.ranks import Mesh, vary_over


class RMSNorm(ParallelLayer):
    """`ops.rms_norm` with a weight of its own.

    Args:
        hidden_size: of the last dim, which is whole on each rank.
        eps: added inside the square root; no default, since models differ.
        offset: 1.0 where the weight is kept minus one, as Gemma's; it starts as zeros then.
        rounds_once: see `ops.rms_norm`.
        mesh: None where x is the same on all ranks, as residuals are. The ranks where each has
            values of its own, as the heads that a column-parallel layer returned: the weight is
            whole on each, and its gradient is summed over them.
        dtype, device: of the weight.
    Shapes:
        x (..., hidden_size) -> the same.
    """

    weight: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        offset: float = 0.0,
        rounds_once: bool = False,
        mesh: Mesh = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(mesh)
        self.hidden_size = hidden_size
        self.eps, self.offset, self.rounds_once = eps, offset, rounds_once
        self.declare("weight", (hidden_size,), dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        weight = vary_over(self.ranks, self.weight)
        return ops.rms_norm(
            x, weight, eps=self.eps, offset=self.offset, rounds_once=self.rounds_once
        )

    def extra_repr(self) -> str:
        offset = f", offset={self.offset}" if self.offset else ""
        return f"{super().extra_repr()}, eps={self.eps}{offset}"


class LayerNorm(ParallelLayer):
    """`ops.layer_norm` with a weight and a bias of its own.

    Args:
        hidden_size: of the last dim, which is whole on each rank.
        eps: added inside the square root; no default, since models differ.
        bias: whether there is one.
        mesh: as of `RMSNorm`.
        dtype, device: of the weight and the bias.
    Shapes:
        x (..., hidden_size) -> the same.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        bias: bool = True,
        mesh: Mesh = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(mesh)
        self.hidden_size, self.eps = hidden_size, eps
        self.declare("weight", (hidden_size,), dtype, device)
        if bias:
            self.declare("bias", (hidden_size,), dtype, device)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = vary_over(self.ranks, self.weight)
        bias = None if self.bias is None else vary_over(self.ranks, self.bias)
        return ops.layer_norm(x, weight, bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"
