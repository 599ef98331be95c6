"""One vector a sequence: what a model that pools answers, by the pure function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcmodels import tree
from funcmodels.errors import TaskError
from funcmodels.prompts import Prompts, prompts
from funcmodels.spec import POOLING_TASKS, Model


@torch.no_grad()
def embed(model: Model, weights: Any, tokens: Prompts) -> Tensor:
    """The embedding of each sequence.

    y = pooling(forward(tokens)), in float32; with `normalize`, y / |y|.

    Args:
        model: of task "embed".
        tokens: a sequence (seq,), or several: (batch, seq), or a list of lists of any lengths.
    Returns:
        (hidden,) float32 on the CPU for one sequence, (batch, hidden) for several.
    Raises:
        TaskError: the model is for another task.
        ShapeError: an empty sequence.
    """
    check_task(model, "embed")
    pooled, is_single = _pooled(model, weights, tokens)
    found = F.normalize(pooled, dim=-1) if model.normalize else pooled
    return found[0] if is_single else found


@torch.no_grad()
def classify(model: Model, weights: Any, tokens: Prompts) -> Tensor:
    """The classification of each sequence.

    y = pooling(forward(tokens)), in float32; with `normalize`, softmax(y) over the labels, and
    sigmoid(y) where there is one label only.

    Args:
        model: of task "classify".
        tokens: as for `embed`.
    Returns:
        (labels,) float32 on the CPU for one sequence, (batch, labels) for several.
    Raises:
        TaskError: the model is for another task.
        ShapeError: an empty sequence.
    """
    check_task(model, "classify")
    pooled, is_single = _pooled(model, weights, tokens)
    if model.normalize:
        pooled = pooled.softmax(-1) if pooled.shape[-1] > 1 else pooled.sigmoid()
    return pooled[0] if is_single else pooled


def check_task(model: Model, task: str) -> None:
    """Refuse what a model was not declared for.

    Raises:
        TaskError: its task is another.
    """
    if model.task == task:
        return
    pooling = ', pooling="last"' if task in POOLING_TASKS else ""
    raise TaskError(
        f"{model.name} is no model to {task} with",
        got=f"task={model.task!r}",
        need=f"task={task!r}, with a forward that returns what that task needs",
        fix=f"fm.{model.task}(model, weights, ...), or fm.Model(..., task={task!r}{pooling})",
    )


def _pooled(model: Model, weights: Any, tokens: Prompts) -> tuple[Tensor, bool]:
    """Float32 vectors (batch, width), and whether there was one sequence only.

    Each sequence runs alone: attention that is not causal would see the padding of a batch.
    """
    rows, is_single = prompts(tokens)
    device = tree.leaves(weights)[0].device
    vectors = []
    for row in rows:
        positions = torch.arange(len(row), device=device)
        states = model.forward(weights, torch.tensor(row, device=device), positions).float()
        vectors.append(_pool(states, model.pooling).cpu())
    return torch.stack(vectors), is_single


def _pool(states: Tensor, pooling: str | None) -> Tensor:
    """(seq, width) -> (width,)."""
    if pooling == "mean":
        return states.mean(0)
    assert pooling in ("last", "cls")
    return states[-1 if pooling == "last" else 0]
