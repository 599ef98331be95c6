"""Lion: the sign of a momentum, on torch's foreach kernels."""

# pyright: reportPrivateImportUsage=false
# torch's fused and foreach kernels have names with an underscore; torch.optim calls them so.

from __future__ import annotations

import torch
from torch import Tensor

from funcmodels.optim.arguments import check_betas
from funcmodels.optim.masks import Mask
from funcmodels.optim.optimizer import Hyper, Optimizer, optimizer_of
from funcmodels.optim.schedules import Schedule


def lion(
    lr: float | Schedule,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    decay: Mask | None = None,
    state_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Lion: half of Adam's state; every weight moves by lr, one way or the other.

    w = w - lr (weight_decay w + sign(b1 m + (1 - b1) g));  m = b2 m + (1 - b2) g

    Args:
        lr: about a tenth of AdamW's, with ten times its weight decay.
        decay: the parameters that `weight_decay` is for; None means all.
        state_dtype: of m; None means that of each weight. The authors use bfloat16.
    Raises:
        TrainingError: an argument is out of its range.
    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """
    check_betas("lion", betas, (0.9, 0.99))
    b1, b2 = betas

    def rule(
        path: str, w: Tensor, g: Tensor, state: tuple[Tensor, ...], hyper: Hyper
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (m,) = state
        direction = torch.lerp(m, g, 1 - b1).sign()
        w = w * (1 - hyper.rate * hyper.weight_decay) - hyper.rate * direction
        return w, (torch.lerp(m, g, 1 - b2),)

    def kernel(
        paths: list[str],
        ws: list[Tensor],
        gs: list[Tensor],
        states: tuple[list[Tensor], ...],
        hyper: Hyper,
    ) -> None:
        rate = float(hyper.rate)
        directions = torch._foreach_lerp(states[0], gs, 1 - b1)
        torch._foreach_sign_(directions)
        torch._foreach_mul_(ws, 1 - rate * hyper.weight_decay)
        torch._foreach_add_(ws, directions, alpha=-rate)
        torch._foreach_lerp_(states[0], gs, 1 - b2)

    return optimizer_of(
        "lion",
        ("m",),
        rule,
        kernel,
        lr=lr,
        weight_decay=weight_decay,
        decay=decay,
        state_dtype=state_dtype,
    )
