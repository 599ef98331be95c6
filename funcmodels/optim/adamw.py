"""AdamW, on torch's fused kernel."""

# pyright: reportPrivateImportUsage=false
# torch's fused and foreach kernels have names with an underscore; torch.optim calls them so.

from __future__ import annotations

import torch
from torch import Tensor

from funcmodels.optim.arguments import NOT_NEGATIVE, check_betas, check_number
from funcmodels.optim.masks import Mask
from funcmodels.optim.optimizer import Hyper, Optimizer, optimizer_of
from funcmodels.optim.schedules import Schedule


def adamw(
    lr: float | Schedule,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay: Mask | None = None,
    state_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay; the defaults are torch's.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    w = w - lr (weight_decay w + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

    Args:
        decay: the parameters that `weight_decay` is for, as `fm.optim.not_matching("*norm*")`;
            None means all.
        state_dtype: of m and v; None means that of each weight.
    Returns:
        An optimiser that equals `torch.optim.AdamW(fused=True)` bit for bit.
    Raises:
        TrainingError: an argument is out of its range.
    Source: Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    check_betas("adamw", betas, (0.9, 0.999))
    check_number("adamw", "eps", eps, NOT_NEGATIVE, fix="eps=1e-8")
    b1, b2 = betas

    def rule(
        path: str, w: Tensor, g: Tensor, state: tuple[Tensor, ...], hyper: Hyper
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        m = torch.lerp(state[0], g, 1 - b1)
        v = torch.lerp(state[1], g * g, 1 - b2)
        t = hyper.step.to(torch.float64)
        denominator = (v / (1 - b2**t)).sqrt() + eps
        w = w * (1 - hyper.rate * hyper.weight_decay) - hyper.rate / (1 - b1**t) * m / denominator
        return w, (m, v)

    def kernel(
        paths: list[str],
        ws: list[Tensor],
        gs: list[Tensor],
        states: tuple[list[Tensor], ...],
        hyper: Hyper,
    ) -> None:
        # Filled on the device from a number on the CPU: nothing waits for the device.
        t = torch.full((), float(hyper.step), device=ws[0].device)
        torch._fused_adamw_(
            ws,
            gs,
            states[0],
            states[1],
            [],
            [t] * len(ws),
            lr=hyper.rate,
            beta1=b1,
            beta2=b2,
            weight_decay=hyper.weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    return optimizer_of(
        "adamw",
        ("m", "v"),
        rule,
        kernel,
        lr=lr,
        weight_decay=weight_decay,
        decay=decay,
        state_dtype=state_dtype,
    )
