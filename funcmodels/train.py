"""`fm.fit`: a training loop to use, or to read and replace."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from funcmodels import optim, tree
from funcmodels.finite import refuse
from funcmodels.gradients import accumulate, grad_and_value
from funcmodels.precision import cast
from funcmodels.spec import Model
from funcmodels.stop import on_signals
from funcmodels.train_check import check_arguments, check_batch, check_evaluation
from funcmodels.train_data import Data, Source, num_tokens, to_device
from funcmodels.train_job import on_mesh, one_process
from funcmodels.train_log import Log
from funcmodels.train_resume import keeper_of, restore, save
from funcmodels.training_checkpoint import Checkpoints

if TYPE_CHECKING:
    from compiler.torch_target import CompiledModel

# (model, weights, batch) -> scalar
Loss = Callable[[Any, Any, Any], Tensor]


@dataclass
class Fitted:
    """What `fit` returns.

    Args:
        weights, state: of the model and of the optimiser, after `step` steps.
        losses: before each step that this call did.
        stopped: the signal that ended it early, as "SIGTERM".
    """

    weights: Any
    state: Any
    step: int = 0
    losses: list[float] = field(default_factory=list)
    stopped: str | None = None


def fit(
    model: Model | CompiledModel,
    weights: Any,
    data: Data,
    *,
    steps: int,
    optimizer: optim.Optimizer,
    loss: Loss | None = None,
    microbatches: int = 1,
    dtype: torch.dtype | None = None,
    clip: float | None = None,
    evaluate: Callable[[Any], Mapping[str, float | Tensor]] | None = None,
    evaluate_every: int = 100,
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    save_every: int = 100,
    resume: bool = True,
    log: str | os.PathLike[str] | None = None,
    tensorboard: str | os.PathLike[str] | None = None,
    compile: bool | str = False,
    donate: bool = False,
    progress: bool = True,
    console: Console | None = None,
) -> Fitted:
    """Train, from the newest checkpoint if there is one, to a number of steps.

    SIGINT and SIGTERM end it after the step at work, with a checkpoint; a second one at once.

    On several processes, `model` is what `fm.compile_to_torch(model, mesh)` returns and `weights`
    its `weights()`; every process calls this, with batches of its own along "dp" and "fsdp".

    Args:
        model: what is trained.
        weights: its parameters; the masters, where `dtype` is another.
        data: batches: an iterable, gone through again at its end, or a function of the batch's
            number. A resumed run goes on where the other stopped.
        steps: in all, those before a checkpoint included.
        optimizer: as `fm.optim.adamw(3e-4)`.
        loss: (model, weights, batch) -> scalar, a mean; `fm.loss` on the batches of `fm.pack` by
            default. On a mesh it must be the mean over all processes, see `CompiledModel.mean`.
        microbatches: the parts in which a batch is gone through, to need less memory, see
            `fm.accumulate`.
        dtype: to compute in, see `fm.cast`; None is that of the weights.
        clip: the largest norm of all gradients together; they are scaled down to it.
        evaluate: weights -> {name: number, or a tensor of one}, called every `evaluate_every` steps
            and at the end.
        checkpoints: a folder, or `fm.Checkpoints(folder, keep=3)`; saved every `save_every` steps
            and at the end: weights, optimiser, random generators, place in the data.
        resume: False refuses a folder that has checkpoints.
        log: a JSONL file, a row for each step.
        tensorboard: a folder; needs the extra `tensorboard`.
        compile: the loss, and so its gradient, with `torch.compile`; True, or a backend's name.
        donate: train in the memory of `weights` itself, which are overwritten; else in a copy, and
            a module still computes with the old ones: `module.load(module.whole(fitted.weights))`.
    Raises:
        NotFiniteError: a loss or a gradient is NaN or infinite; it names the step, the batch and
            the first block. The weights were not touched by that step.
        CheckpointError: the newest checkpoint is of another model or optimiser, or of more steps.
        TrainingError: an argument that cannot work, see `funcmodels/train_check.py`; an optimiser
            of your own that cannot work on parts of parameters; processes that start with other
            weights, or with other batches where they share the layers.
        ShapeError: a weight has another shape than its parameter.
    """
    check_arguments(
        model,
        weights,
        data,
        optimizer,
        loss=loss,
        clip=clip,
        dtype=dtype,
        evaluate=evaluate,
        steps=steps,
        microbatches=microbatches,
        evaluate_every=evaluate_every,
        save_every=save_every,
    )
    weights = tree.map(lambda w: w.detach() if donate else w.detach().clone(), weights)
    done = Fitted(weights, optimizer.init(weights))
    device = tree.leaves(weights)[0].device
    alone = isinstance(model, Model)
    job = one_process(model, optimizer) if alone else on_mesh(model, optimizer, done)
    source, keeper = Source(data), keeper_of(checkpoints, resume, steps)
    if keeper is not None and (newest := keeper.latest()) is not None:
        restore(keeper, newest, job, done, source)

    def loss_of(weights: Any, batch: Any) -> Tensor:
        weights = weights if dtype is None else cast(job.model, weights, dtype)
        return (loss or job.loss)(model, weights, batch)

    # The loss alone is compiled: the backward pass is split off it with what remat says of it, and
    # collectives and counts around it stay out of the graph.
    backend = "inductor" if compile is True else compile
    differentiated = torch.compile(loss_of, backend=backend) if backend else loss_of
    if microbatches > 1:
        gradients = accumulate(differentiated, microbatches, count=job.count)
    else:
        gradients = grad_and_value(differentiated)
    leader = not dist.is_initialized() or dist.get_rank() == 0
    said = Log(
        step=done.step,
        steps=steps,
        jsonl=log if leader else None,
        tensorboard=tensorboard if leader else None,
        progress=progress and leader,
        console=console,
    )
    saved = done.step
    with said, on_signals() as stop:
        while done.step < steps and not stop.agreed():
            place, batch = source.position, source.next()
            if loss is None:
                check_batch(batch, place)
            batch = to_device(batch, device)
            if not done.losses:
                job.agree(done.weights, batch)
            drawn = torch.get_rng_state()
            grads, value = gradients(done.weights, batch)
            norm, value = float(job.norm(grads, value)), float(value)
            if not (math.isfinite(value) and math.isfinite(norm)):
                if keeper is not None:
                    keeper.wait()
                torch.set_rng_state(drawn)  # the second run draws what the first one drew
                cause = job.why(value, grads, done.weights, batch, loss_of)
                what = f"the loss ({value}) or the gradient ({norm}) is not finite"
                raise refuse(what, done.step, batch, place, cause)
            if clip is not None:
                grads = optim.scale_to_norm(grads, torch.tensor(norm), clip, donate=True)
            done.weights, done.state = job.optimizer.update(
                grads, done.state, done.weights, donate=True
            )
            done.step += 1
            done.losses.append(value)
            said.step(done.step, loss=value, grad_norm=norm, tokens=num_tokens(batch) * job.batches)
            if evaluate is not None and (done.step % evaluate_every == 0 or done.step == steps):
                found = check_evaluation(evaluate(done.weights))
                said.row("evaluation", done.step, **found)
                said.not_training()
            if keeper is not None and done.step % save_every == 0:
                save(keeper, job, done, source)
                saved = done.step
                said.not_training()
        done.stopped = stop.asked.name if stop.asked is not None else None
        if keeper is not None:
            if saved < done.step:
                save(keeper, job, done, source)
            keeper.wait()
        said.row("end", done.step, stopped=done.stopped)
    return done
