"""Forward mode inside the jvp of a `torch.autograd.Function`, so that jvp of jvp is right.

PyTorch calls a Function's jvp with forward mode off, at every level: the tangents that an outer jvp
asks for are lost, and jvp of jvp is zero without an error. Turned on again, the inputs must be
stripped of their tangents at the current level, which this jvp is the rule for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.autograd.forward_ad import _set_fwd_grad_enabled

outer_tangents = partial(_set_fwd_grad_enabled, True)


def values(tensors) -> list[Any]:
    """The tensors without their tangents at the current level; None stays None."""
    return [None if t is None else torch.ops.aten._fw_primal(t, 0) for t in tensors]
