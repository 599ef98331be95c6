"""What optimisers, transforms and schedules are given: refused when they are made, by name.

A wrong sign or a beta of 1 raises nothing later on: the loss only does not fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from funcmodels.errors import TrainingError


@dataclass(frozen=True)
class Range:
    """Numbers that an argument may be.

    Args:
        said: the range in words.
        holds: of a number, whether it is in the range.
        nearest: of a number that is not, one that may have been meant.
    """

    said: str
    holds: Callable[[float], bool]
    nearest: Callable[[float], float]


def _size(value: float, default: float) -> float:
    return abs(value) if math.isfinite(value) and value else default


def _count(value: float, least: int) -> int:
    return max(least, round(abs(value))) if math.isfinite(value) else least


NOT_NEGATIVE = Range(
    "a number, 0 or more", lambda x: 0 <= x < math.inf, lambda x: _size(x, 0.0)
)  # fmt: skip
POSITIVE = Range("a number above 0", lambda x: x > 0, lambda x: _size(x, 1.0))
RATE = Range(
    "a number, 0 or more, or a schedule", lambda x: 0 <= x < math.inf, lambda x: _size(x, 3e-4)
)
SHARE = Range("a number from 0 to below 1", lambda x: 0 <= x < 1, lambda x: 0.9)
STEPS = Range(
    "a whole number of steps, 0 or more",
    lambda x: x >= 0 and x == math.floor(x) < math.inf,
    lambda x: _count(x, 0),
)
SOME_STEPS = Range(
    "a whole number of steps, 1 or more",
    lambda x: x >= 1 and x == math.floor(x) < math.inf,
    lambda x: _count(x, 1),
)


def check_number(what: str, name: str, value: Any, need: Range, fix: str | None = None) -> None:
    """An argument is a number of a range; a tensor of one element is one too.

    Args:
        what: whose argument, as "adamw".
        fix: None for the nearest number.
    Raises:
        TrainingError: it is none, or another.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and need.holds(float(value)):
        return
    nearest = need.nearest(float(value) if is_number else math.nan)
    raise TrainingError(
        f"fm.optim.{what}: {name} is out of range",
        got=f"{name}={value!r}",
        need=need.said,
        fix=fix or f"{name}={nearest!r}",
    )


def check_betas(what: str, betas: Any, default: tuple[float, float]) -> None:
    """A pair of shares.

    Raises:
        TrainingError: it is none; with a beta of 1, a mean would stay the zeros it began with.
    """
    if (
        isinstance(betas, Sequence)
        and len(betas) == 2
        and all(isinstance(beta, Real) and SHARE.holds(float(beta)) for beta in betas)
    ):
        return
    raise TrainingError(
        f"fm.optim.{what}: betas are out of range",
        got=f"betas={betas!r}",
        need="two numbers from 0 to below 1",
        fix=f"betas={default}",
    )


def check_state_dtype(what: str, dtype: Any) -> None:
    """Of floating numbers, or None.

    Raises:
        TrainingError: it is another, in which every small number would be 0.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    raise TrainingError(
        f"fm.optim.{what}: the state would not hold fractions",
        got=f"state_dtype={dtype!r}",
        need="a floating dtype, or None for that of each weight",
        fix="state_dtype=torch.bfloat16",
    )


def check_optimizer(what: str, optimizer: Any) -> None:
    """It has what an `fm.optim.Optimizer` has.

    Raises:
        TrainingError: it is something else, as an optimiser of torch.optim.
    """
    if all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        return
    raise TrainingError(
        f"fm.optim.{what}: no optimiser",
        got=getattr(optimizer, "__name__", type(optimizer).__name__),
        need="a pair of functions: init(weights), and update(grads, state, weights)",
        fix="fm.optim.adamw(3e-4), or another of fm.optim, called",
    )
