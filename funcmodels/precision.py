"""Mixed precision: a cast of all weights, inside of the function that gradients are taken of."""

from __future__ import annotations

from typing import Any

import torch

from funcmodels import tree
from funcmodels.spec import Model


def cast(model: Model, weights: Any, dtype: torch.dtype) -> Any:
    """The weights in another dtype, but for those whose declaration has one of its own.

    With float32 masters and bfloat16 compute, the cast is part of the loss, and gradients arrive in
    float32: `fm.grad_and_value(lambda w, b: fm.loss(model, fm.cast(model, w, torch.bfloat16), b))`.

    Args:
        model: whose declarations say `dtype=` where a parameter must keep its own.
        weights: a pytree of tensors, or of gradients, with the structure of `model.params`.
        dtype: a floating dtype.
    Returns:
        A pytree of the same structure. What is of its dtype already is the same tensor.
    """

    def one(param: Any, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        return value.to(dtype if param.dtype is None else param.dtype)

    return tree.map(one, model.params, weights)
