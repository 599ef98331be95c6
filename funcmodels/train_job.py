"""What differs in `fm.fit` between one process that has all and several that share a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from funcmodels import tree
from funcmodels.errors import TrainingError
from funcmodels.finite import first_not_finite, is_finite
from funcmodels.loss import loss
from funcmodels.optim import Optimizer, global_norm
from funcmodels.spec import Model
from funcmodels.training_places import Place, is_part

if TYPE_CHECKING:
    from compiler.torch_target import CompiledModel
    from funcmodels.train import Fitted


@dataclass(frozen=True)
class Job:
    """How a run takes its loss, its norm, and where its tensors lie.

    Args:
        model: the declarations.
        loss: (what `fit` was given, weights, batch) -> the mean over all processes.
        norm: gradients -> the norm of all of them, on all processes.
        why: (weights, batch, loss) -> what is not finite first, and the line.
        places: the parts of whole tensors that this process holds, for checkpoints.
        batches: how many batches a step is made of.
    """

    model: Model
    loss: Callable[[Any, Any, Any], Tensor]
    norm: Callable[[Any], Tensor]
    why: Callable[..., tuple[str, str | None]]
    places: dict[str, Place] = field(default_factory=dict)
    batches: int = 1


def one_process(model: Model) -> Job:
    """All is here."""
    return Job(model, loss, global_norm, first_not_finite)


def on_mesh(module: CompiledModel, optimizer: Optimizer, done: Fitted) -> Job:
    """Each process holds a part.

    Raises:
        TrainingError: see `check`.
    """
    check(module, optimizer)
    return Job(
        module.model,
        module_loss,
        norm_over(module),
        parameter_not_finite,
        places_of(module, done.state),
        prod(comm.size for comm in module.ranks.of_data) if module.ranks is not None else 1,
    )


def module_loss(module: CompiledModel, weights: Any, batch: Any) -> Tensor:
    """As `fm.loss`, over the tokens of all processes; each gives its own batch."""
    return module.loss(weights, batch)


def check(module: CompiledModel, optimizer: Optimizer) -> None:
    """Refuse what would be computed of a part as if it were the whole.

    Raises:
        TrainingError: an optimiser that looks at whole matrices, or at all gradients together; or
            processes that are not in the mesh.
    """
    parts = [path for path, place in module.placements().items() if is_part(place)]
    if parts and not optimizer.elementwise:
        raise TrainingError(
            "this optimiser needs whole parameters, and each process holds a part of them",
            got=f"Muon, or a chain with clipping, and {parts[0]} in parts",
            need="an optimiser in which an element's step depends on that element alone",
            fix="fm.optim.adamw(...), with fit(clip=...) for the norm over all processes",
        )
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


def parameter_not_finite(
    weights: Any, batch: Any, loss: Callable[..., Any]
) -> tuple[str, str | None]:
    """What a process can say alone: a second run that stops in one of them leaves the others."""
    for path, leaf in tree.items(weights):
        if not is_finite(leaf):
            return f"the parameter {path} of process {dist.get_rank()}, before the step", None
    return "not looked for on a mesh: run this step with fm.fit(model, ...) on one process", None


def norm_over(module: CompiledModel) -> Callable[[Any], Tensor]:
    """The norm of gradients that lie in parts, and some of them on several processes."""
    places = module.placements()
    if not dist.is_initialized():
        return global_norm
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, {path: tuple(place.offset) for path, place in places.items()})
    own = every[dist.get_rank()]
    holders = {path: sum(other[path] == at for other in every) for path, at in own.items()}

    def norm(grads: Any) -> Tensor:
        squares = [
            leaf.detach().to(torch.float64).square().sum() / holders[path]
            for path, leaf in tree.items(grads)
        ]
        total = torch.stack(squares).sum()
        dist.all_reduce(total)
        return total.sqrt()

    return norm
