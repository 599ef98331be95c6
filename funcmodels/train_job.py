"""What differs in `fm.fit` between one process that has all and several that share a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from funcmodels import tree
from funcmodels.errors import TrainingError
from funcmodels.finite import (
    Found,
    first_not_finite,
    not_finite_gradients,
    of_gradients,
    why_not_finite,
)
from funcmodels.gradients import count_of
from funcmodels.loss import loss
from funcmodels.optim import Optimizer, global_norm, sharded
from funcmodels.optim.parts import holders, sum_of_squares
from funcmodels.spec import Model
from funcmodels.train_agree import agree_alone, agree_on_mesh
from funcmodels.training_places import Place

if TYPE_CHECKING:
    from compiler.comm import Processes
    from compiler.torch_target import CompiledModel
    from funcmodels.train import Fitted


@dataclass(frozen=True)
class Job:
    """How a run takes its loss, its norm, and where its tensors lie.

    Args:
        model: the declarations.
        loss: (what `fit` was given, weights, batch) -> the mean over all processes.
        norm: (gradients, loss) -> the norm of all of them, on all processes; on several, no number
            where any one's loss is none.
        why: (loss's value, gradients, weights, batch, loss) -> what is not finite first.
        optimizer: that of the parts which this process holds.
        places: the parts of whole tensors that this process holds, for checkpoints.
        batches: how many batches a step is made of.
        count: (batch) -> of how many things the loss is the mean, over all processes.
        agree: (weights, batch), called before the first step: refuses processes that do not belong
            together.
    """

    model: Model
    loss: Callable[[Any, Any, Any], Tensor]
    norm: Callable[[Any, Tensor], Tensor]
    why: Callable[..., Found]
    optimizer: Optimizer
    places: dict[str, Place] = field(default_factory=dict)
    batches: int = 1
    count: Callable[[Any], Tensor] = count_of
    agree: Callable[[Any, Any], None] = agree_alone


def one_process(model: Model, optimizer: Optimizer) -> Job:
    """All is here."""
    return Job(model, loss, lambda grads, _: global_norm(grads), why_not_finite, optimizer)


def on_mesh(module: CompiledModel, optimizer: Optimizer, done: Fitted) -> Job:
    """Each process holds a part.

    Raises:
        TrainingError: see `check`, and `fm.optim.sharded`.
    """
    check(module)
    return Job(
        module.model,
        module_loss,
        norm_over(module),
        why_on_mesh,
        sharded(optimizer, module),
        places_of(module, done.state),
        math.prod(comm.size for comm in data_ranks(module)),
        count_over(module),
        partial(agree_on_mesh, module),
    )


def data_ranks(module: CompiledModel) -> list[Processes]:
    """The dims of the mesh along which processes have batches of their own."""
    return module.ranks.of_data if module.ranks is not None else []


def module_loss(module: CompiledModel, weights: Any, batch: Any) -> Tensor:
    """As `fm.loss`, over the tokens of all processes; each gives its own batch."""
    return module.loss(weights, batch)


def count_over(module: CompiledModel) -> Callable[[Any], Tensor]:
    """`count_of` the batches of all processes together, of which `module.loss` is the mean."""

    def count(batch: Any) -> Tensor:
        total = count_of(batch).to(torch.float64)
        for comm in data_ranks(module):
            (total,) = comm.total([total])
        return total

    return count


def check(module: CompiledModel) -> None:
    """Refuse processes that are not in the mesh.

    Raises:
        TrainingError: there are some.
    """
    size = module.mesh.size() if module.mesh is not None else 1
    if dist.is_initialized() and dist.get_world_size() != size:
        raise TrainingError(
            "the mesh has other processes than the job",
            got=f"a mesh of {size}, {dist.get_world_size()} processes",
            need="a mesh of all of them",
            fix="fm.compile_to_torch(model, mesh), with data parallelism as its dim 'dp'",
        )


def places_of(module: CompiledModel, state: Any) -> dict[str, Place]:
    """Where each tensor of a checkpoint lies: what has a parameter's path and shape, as it does."""
    places = module.placements()
    found: dict[str, Place] = {f"weights.{path}": place for path, place in places.items()}
    for name, leaf in tree.items({"optimizer": state}):
        parts = name.split(".")
        for i in range(1, len(parts)):  # the longest path that the name ends in
            place = places.get(".".join(parts[i:]))
            if place is not None and tuple(leaf.shape) == tuple(place.size):
                found[name] = place
                break
    return found


def why_on_mesh(
    loss_value: float, grads: Any, weights: Any, batch: Any, loss: Callable[[Any, Any], Tensor]
) -> Found:
    """What is not finite first on any process; all of them call this, and are told the same."""
    if not dist.is_initialized():
        return why_not_finite(loss_value, grads, weights, batch, loss)
    if all(_of_all(math.isfinite(loss_value))):
        found = _of_all(not_finite_gradients(grads))
        paths = [path for path, _ in tree.items(grads) if any(path in own for own in found)]
        cause, ranks = of_gradients(paths), [r for r, own in enumerate(found) if own]
    else:
        causes = _of_all(first_not_finite(weights, batch, loss, stops=False))
        cause = min(causes, key=lambda cause: cause.at)
        ranks = [rank for rank, other in enumerate(causes) if other.at == cause.at]
    if not ranks:
        return cause
    text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return replace(cause, what=f"{cause.what}, on {text}")


def _of_all(value: Any) -> list[Any]:
    """What each process has of this, by rank."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def refuse_own(loss: float) -> None:
    """Refuse a loss that is a mean over this process's rows alone.

    Raises:
        TrainingError: the processes have different losses, so none has that of all rows.
    """
    every = _of_all(loss)
    if all(map(math.isfinite, every)) and max(every) - min(every) > 1e-5 * max(map(abs, every)):
        raise TrainingError(
            "each process has a loss of its own",
            got=", ".join(f"{value:.6g}" for value in every[:5]),
            need="the mean over all processes; of means over their own rows, the gradients are "
            "as many times too large as there are processes",
            fix="loss=lambda module, weights, batch: module.mean(losses, mask), of each token",
        )


def norm_over(module: CompiledModel) -> Callable[[Any, Tensor], Tensor]:
    """The norm of gradients that lie in parts, and some of them on several processes."""
    if not dist.is_initialized():
        return lambda grads, _: global_norm(grads)
    held = holders(module)
    is_first = True

    def norm(grads: Any, loss: Tensor) -> Tensor:
        nonlocal is_first
        if is_first:
            refuse_own(float(loss))
        is_first = False
        # Not finite on one process is so on all, which then look for the reason together.
        return sum_of_squares(grads, held, 0 * loss.detach().to(torch.float64)).sqrt()

    return norm
