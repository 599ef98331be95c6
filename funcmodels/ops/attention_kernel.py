"""What a kernel of attention is: what it cannot express, a forward, and a backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from funcmodels.ops.attention_reference import Inputs, Rules


class Call(NamedTuple):
    """One call of attention: its differentiable inputs, segments, static rules."""

    x: Inputs
    segment_ids: Tensor | None  # (*batch or 1s, seq)
    rules: Rules


@dataclass(frozen=True)
class Kernel:
    """An implementation. All kernels agree on the meaning of `out` and `lse`.

    `out` is (*batch, seq, heads, dv) in q's dtype; `lse` is (*batch, heads, seq), the natural
    logarithm of the softmax's denominator with the sink in it, float32 or wider. So the backward of
    one kernel may follow the forward of another.
    """

    name: str
    lacks: Callable[[Call], str | None]  # what of the call it cannot express; None: nothing
    forward: Callable[[Call], tuple[Tensor, Tensor]]  # out, lse
    backward: Callable[[Call, Tensor, Tensor, Tensor], Inputs]  # of call, grad_out, out, lse
    has_slopes_grad: bool = False
