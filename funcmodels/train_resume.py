"""What `fm.fit` keeps in a checkpoint, and how it goes on from one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from funcmodels import training_storage as storage
from funcmodels.errors import CheckpointError
from funcmodels.rng import rng_state, set_rng_state
from funcmodels.train_data import Source
from funcmodels.training_checkpoint import Checkpoints

if TYPE_CHECKING:
    from funcmodels.train import Fitted
    from funcmodels.train_job import Job


def keeper_of(
    checkpoints: Checkpoints | str | os.PathLike[str] | None, resume: bool, steps: int
) -> Checkpoints | None:
    """The checkpoints of a run of so many steps.

    Raises:
        CheckpointError: there are some, and the run is not to resume; or they are further on.
    """
    if checkpoints is None or isinstance(checkpoints, Checkpoints):
        keeper = checkpoints
    else:
        keeper = Checkpoints(checkpoints)
    if keeper is None or (newest := keeper.latest()) is None:
        return keeper
    if not resume:
        raise CheckpointError(
            f"{keeper.folder} has checkpoints of another run",
            got=f"the newest of step {newest}, and resume=False",
            fix="another folder, or resume=True",
        )
    if newest > steps:
        raise CheckpointError(
            f"{keeper.folder} has checkpoints of more steps than are asked for",
            got=f"the newest of step {newest}, and steps={steps}",
            need="steps in all, those before a checkpoint included",
            fix=f"steps={newest} or more, or another folder",
        )
    return keeper


def save(keeper: Checkpoints, job: Job, done: Fitted, source: Source) -> None:
    """A checkpoint after `done.step` steps."""
    trees = {"weights": done.weights, "optimizer": done.state, "rng": _of_all_ranks(rng_state())}
    about = {"model": job.model.name, "data": source.state()}
    keeper.save(done.step, trees, about, job.places)


def restore(keeper: Checkpoints, step: int, job: Job, done: Fitted, source: Source) -> None:
    """Go on from a checkpoint: weights and state are filled in place.

    The random generators go on too where the job has as many processes as then; with another
    number each draws from a seed of its own, made of the step and its rank.
    """
    about = keeper.about(step)
    if about["model"] != job.model.name:
        raise CheckpointError(
            f"{keeper.folder} is of another model",
            got=about["model"],
            need=job.model.name,
            fix="another folder for checkpoints",
        )
    keeper.load(step, {"weights": done.weights, "optimizer": done.state}, job.places)
    rng = _of_all_ranks(rng_state())
    if keeper.shapes(step, "rng") == {path: value.shape for path, value in rng.items()}:
        keeper.load(step, {"rng": rng})
        set_rng_state({path: value[_rank()].clone() for path, value in rng.items()})
    else:
        torch.manual_seed(step * 1_000_003 + _rank())
    source.restore(about["data"])
    done.step = step
    if _rank() == 0:  # nobody writes yet: what is half-written or half-deleted is a dead run's
        storage.sweep(keeper.folder)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _of_all_ranks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with those of all processes below each other: (ranks, n)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return {name: value[None] for name, value in state.items()}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, {name: value.tolist() for name, value in state.items()})
    return {
        name: torch.tensor([one[name] for one in every], dtype=value.dtype)
        for name, value in state.items()
    }
