"""Learning rates as functions of the step: the number of updates already done, from 0.

They are arithmetic on a () tensor in float64, so that a compiled step is compiled once and not
for every rate. A schedule of your own is any such function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from funcmodels.errors import TrainingError
from funcmodels.optim.arguments import NOT_NEGATIVE, SOME_STEPS, STEPS, check_number

Schedule: TypeAlias = Callable[[Tensor], Tensor]


def constant(peak: float, *, warmup: int = 0) -> Schedule:
    """`peak`, after a linear warm-up."""
    check_number("constant", "peak", peak, NOT_NEGATIVE)
    check_number("constant", "warmup", warmup, STEPS, _as_steps(warmup, None))
    return lambda step: peak * _rise(_float(step), warmup)


def linear(peak: float, *, total: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """A linear warm-up, then a line to `final` at step `total`."""
    _check("linear", peak, final, total, warmup=warmup)

    def rate(step: Tensor) -> Tensor:
        t = _float(step)
        fall = peak + (final - peak) * _share(t, warmup, total)
        return torch.where(t < warmup, peak * _rise(t, warmup), fall)

    return rate


def cosine(peak: float, *, total: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """A linear warm-up, then half a cosine to `final` at step `total`.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.
    """
    _check("cosine", peak, final, total, warmup=warmup)

    def rate(step: Tensor) -> Tensor:
        t = _float(step)
        fall = final + (peak - final) * 0.5 * (1 + torch.cos(math.pi * _share(t, warmup, total)))
        return torch.where(t < warmup, peak * _rise(t, warmup), fall)

    return rate


def wsd(peak: float, *, total: int, warmup: int = 0, decay: int, final: float = 0.0) -> Schedule:
    """Warm-up, stable, decay: `peak` until the last `decay` steps, then a line to `final`.

    Source: Hu et al. 2024, arXiv:2404.06395.
    """
    _check("wsd", peak, final, total, warmup=warmup, decay=decay)

    def rate(step: Tensor) -> Tensor:
        t = _float(step)
        fall = peak + (final - peak) * _share(t, total - decay, total)
        return torch.where(t < warmup, peak * _rise(t, warmup), fall)

    return rate


def _float(step: Tensor | int) -> Tensor:
    return torch.as_tensor(step).to(torch.float64)


def _rise(step: Tensor, warmup: int) -> Tensor:
    """From 1 / warmup at step 0 to 1: the first step is not lost on a rate of zero."""
    return ((step + 1) / max(warmup, 1)).clamp(max=1.0)


def _share(step: Tensor, start: int, end: int) -> Tensor:
    """How much of the way from `start` to `end` is done, between 0 and 1."""
    return ((step - start) / max(end - start, 1)).clamp(0.0, 1.0)


def _check(what: str, peak: float, final: float, total: int, **parts: int) -> None:
    """Rates are no less than zero, and the parts' steps no more than all."""
    check_number(what, "peak", peak, NOT_NEGATIVE)
    check_number(what, "final", final, NOT_NEGATIVE)
    check_number(what, "total", total, SOME_STEPS)
    for name, steps in parts.items():
        check_number(what, name, steps, STEPS, _as_steps(steps, total, name))
    used = sum(parts.values())
    if used > total:
        raise TrainingError(
            f"fm.optim.{what}: a schedule is shorter than its parts",
            got=f"total={total}, and {used} steps of {' and '.join(parts)}",
            need="total of at least their sum",
            fix=f"total={used}",
        )


def _as_steps(value: Any, total: int | None, name: str = "warmup") -> str | None:
    """A fix for who gave a share of all steps: other libraries take one."""
    if isinstance(value, float) and 0 < value < 1:
        steps = (
            f"{name}=round({value} * total)" if total is None else f"{name}={round(value * total)}"
        )
        return f"{steps}, if {value} was meant as a share of all steps"
    return None
