"""What is done with gradients before an optimiser gets them: functions of a tree, chained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from funcmodels import tree
from funcmodels.errors import TrainingError
from funcmodels.optim.arguments import POSITIVE, check_number, check_optimizer
from funcmodels.optim.optimizer import Optimizer, is_transformed
from funcmodels.optim.parts import parts


class Transform(Protocol):
    """Gradients -> gradients; with `donate` those given may be overwritten."""

    def __call__(self, grads: Any, *, donate: bool = False) -> Any: ...


def chain(*links: Any) -> Optimizer:
    """Transforms of the gradients in their order, and then an optimiser, which is the last.

    fm.optim.chain(fm.optim.clip_by_global_norm(1.0), fm.optim.adamw(3e-4))

    Raises:
        TrainingError: the last is no optimiser, or one before it no transform.
    """
    transforms = links[:-1]
    optimizer: Any = links[-1] if links else None
    check_optimizer("chain: the last link", optimizer)
    for link in transforms:
        if not callable(link) or isinstance(link, type):
            raise TrainingError(
                "fm.optim.chain: a link before the last is no transform",
                got=getattr(link, "__name__", type(link).__name__),
                need="functions: gradients -> gradients, and then one optimiser",
                fix="fm.optim.chain(fm.optim.clip_by_global_norm(1.0), fm.optim.adamw(3e-4))",
            )

    def update(grads: Any, state: Any, weights: Any, *, donate: bool = False) -> tuple[Any, Any]:
        for transform in transforms:
            grads = transform(grads, donate=donate)
        return optimizer.update(grads, state, weights, donate=donate)

    able = optimizer.elementwise or optimizer.asks
    asks = able and all(isinstance(transform, Clip) for transform in transforms)
    return Optimizer(optimizer.init, update, optimizer.elementwise and not transforms, asks)


def clip_by_global_norm(max_norm: float) -> Transform:
    """Gradients whose norm, taken over all of them together, is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`, which see for the 1e-6. Where processes hold parts of
    parameters, see `fm.optim.sharded`.

    Raises:
        TrainingError: `max_norm` is not above 0; below it, gradients would be turned round.
    """
    check_number("clip_by_global_norm", "max_norm", max_norm, POSITIVE)
    return Clip(max_norm)


@dataclass(frozen=True)
class Clip:
    """`clip_by_global_norm`, which a chain knows to ask for the norm over all processes."""

    max_norm: float

    def __call__(self, grads: Any, *, donate: bool = False) -> Any:
        at = parts()
        norm = global_norm(grads) if at is None else at.norm(grads)
        return scale_to_norm(grads, norm, self.max_norm, donate=donate)


def global_norm(grads: Any) -> Tensor:
    """The 2-norm over all leaves together, () float32 or wider."""
    leaves = [leaf.detach() if not is_transformed(leaf) else leaf for leaf in tree.leaves(grads)]
    if not leaves:
        return torch.zeros(())
    # Each in float32 at least: the norm of a million bfloat16 numbers is not one of them.
    norms = [
        torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for x in leaves
    ]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def scale_to_norm(grads: Any, norm: Tensor, max_norm: float, *, donate: bool = False) -> Any:
    """Gradients of norm `norm`, scaled down to `max_norm` where that is less.

    Raises:
        TrainingError: `max_norm` is not above 0.
    """
    if not torch.compiler.is_compiling():
        check_number("scale_to_norm", "max_norm", max_norm, POSITIVE)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)

    # Autograd may give one tensor to two parameters, which would be scaled twice in place.
    used = Counter(_place(grad) for grad in tree.leaves(grads)) if donate else Counter()

    def scale(grad: Tensor) -> Tensor:
        by = factor.to(grad.device, grad.dtype)
        return (
            grad.mul_(by)
            if donate and _place(grad) is not None and used[_place(grad)] == 1
            else grad * by
        )

    return tree.map(scale, grads)


def _place(grad: Tensor) -> int | None:
    """Where a tensor's memory is; None where that cannot be said, or it overlaps itself."""
    traced = torch.compiler.is_compiling() or is_transformed(grad) or is_fake(grad)
    if traced or 0 in grad.stride():
        return None
    return grad.untyped_storage().data_ptr()
