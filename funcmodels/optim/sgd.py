"""Stochastic gradient descent with momentum, on torch's fused kernel."""

# pyright: reportPrivateImportUsage=false
# torch's fused and foreach kernels have names with an underscore; torch.optim calls them so.

from __future__ import annotations

import torch
from torch import Tensor

from funcmodels.errors import TrainingError
from funcmodels.optim.arguments import SHARE, check_number
from funcmodels.optim.masks import Mask
from funcmodels.optim.optimizer import Hyper, Optimizer, optimizer_of
from funcmodels.optim.schedules import Schedule


def sgd(
    lr: float | Schedule,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: Mask | None = None,
    state_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Gradient descent; without momentum it has no state but the step.

    g = g + weight_decay w;  m = momentum m + g;  w = w - lr m, or, with Nesterov's momentum,
    w = w - lr (g + momentum m)

    The weight decay is part of the gradient, as in torch, and not decoupled as in AdamW.

    Args:
        decay: the parameters that `weight_decay` is for; None means all.
        state_dtype: of m; None means that of each weight.
    Returns:
        An optimiser that equals `torch.optim.SGD(fused=True)` bit for bit.
    Raises:
        TrainingError: an argument is out of its range; Nesterov's momentum without momentum.
    Source: Sutskever et al. 2013, as in `torch.optim.SGD`, without dampening.
    """
    check_number("sgd", "momentum", momentum, SHARE)
    if nesterov and momentum == 0:
        raise TrainingError(
            "Nesterov's momentum needs a momentum",
            got="nesterov=True, momentum=0.0",
            fix="momentum=0.9",
        )

    def rule(
        path: str, w: Tensor, g: Tensor, state: tuple[Tensor, ...], hyper: Hyper
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        g = g + hyper.weight_decay * w
        if not state:
            return w - hyper.rate * g, ()
        m = momentum * state[0] + g
        return w - hyper.rate * (g + momentum * m if nesterov else m), (m,)

    def kernel(
        paths: list[str],
        ws: list[Tensor],
        gs: list[Tensor],
        states: tuple[list[Tensor], ...],
        hyper: Hyper,
    ) -> None:
        torch._fused_sgd_(
            ws,
            gs,
            states[0] if states else [],
            weight_decay=hyper.weight_decay,
            momentum=momentum,
            lr=hyper.rate,
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
            is_first_step=False,  # momentum starts from zeros, which is the same
        )

    return optimizer_of(
        "sgd",
        ("m",) if momentum else (),
        rule,
        kernel,
        lr=lr,
        weight_decay=weight_decay,
        decay=decay,
        state_dtype=state_dtype,
    )
