"""`fm.loss`: the loss of a model on a packed batch, without its logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from funcmodels import ops
from funcmodels.errors import ShapeError
from funcmodels.ops.deferred import Deferred, deferring
from funcmodels.ops.loss_logits import Weights, losses, stats_of
from funcmodels.pooling import check_task
from funcmodels.spec import Model


def loss(
    model: Model,
    weights: Any,
    batch: Mapping[str, Tensor],
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of each next token, over the tokens whose loss mask is True.

    Where the forward function ends in `ops.unembed`, or in it and a factor and a softcap, the
    logits of all tokens never exist, see `ops.cross_entropy`. Whatever else follows is done with
    the logits, and the loss is taken of the result.

    Args:
        model: of task "generate".
        weights: its parameters.
        batch: as of `fm.pack`: tokens (*batch, seq); and, where given, positions, segment_ids,
            loss_mask, and targets, all of that shape. Positions count from 0 unless given. A
            token's target is the token after it unless given; a row's last has none, and a
            token before one of another segment has none.
        reduction: the mean over the tokens that have a loss, their sum, or each token's.
        chunk, label_smoothing, z_loss: see `ops.cross_entropy`.
    Returns:
        A scalar, or (*batch, seq) for "none"; float32, or float64 where the weights are.
    Raises:
        TaskError: the model is for another task.
        ShapeError: an entry that is not of the shape of tokens, or that is not known.
    """
    check_task(model, "generate")
    given = entries(batch)
    with deferring():
        logits = model.forward(
            weights, given["tokens"], given["positions"], given.get("segment_ids")
        )
    return loss_of(
        logits,
        given["targets"],
        given["loss_mask"],
        reduction=reduction,
        chunk=chunk,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )


def loss_of(
    logits: Tensor | Deferred,
    targets: Tensor,
    mask: Tensor | None,
    *,
    reduction: Literal["mean", "sum", "none"],
    chunk: int | None,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Cross-entropy of logits, which may not be computed yet."""
    options = logits.scale_and_softcap() if isinstance(logits, Deferred) else None
    if isinstance(logits, Deferred) and options is not None:
        scale, softcap = options
        return ops.cross_entropy(
            logits.hidden,
            logits.table,
            targets,
            mask=mask,
            reduction=reduction,
            chunk=chunk,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            scale=scale,
            softcap=softcap,
        )
    x = logits.logits() if isinstance(logits, Deferred) else logits
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    chosen = targets if mask is None else torch.where(mask != 0, targets, 0)
    stats = stats_of(x, chosen, means=label_smoothing != 0)
    each = losses(stats, Weights(label_smoothing, z_loss))
    weight = torch.ones_like(each) if mask is None else mask.to(x.dtype)
    each = each * weight
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    total = weight.sum()
    return each.sum() / torch.where(total == 0, 1, total)


ENTRIES = ("tokens", "positions", "segment_ids", "loss_mask", "targets")


def entries(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch with positions, targets and loss_mask, given or made.

    Raises:
        ShapeError: an entry that is not of the shape of tokens, or that is not known.
    """
    given = dict(batch)
    unknown = [name for name in given if name not in ENTRIES]
    if unknown or "tokens" not in given:
        raise ShapeError(
            "loss: a batch has tokens, and what it may have beside them",
            got=", ".join(given) or "an empty batch",
            need=f"tokens, and of {', '.join(ENTRIES[1:])} those there are",
            fix="fm.pack(documents, length)",
        )
    tokens = given["tokens"]
    for name, value in given.items():
        if value.shape != tokens.shape:
            raise ShapeError(
                f"loss: {name} differs in shape from tokens",
                got=f"{name} {tuple(value.shape)}, tokens {tuple(tokens.shape)}",
                need="one shape",
                fix=f"{name}.expand_as(tokens)",
            )
    if "positions" not in given:
        counted = torch.arange(tokens.shape[-1], device=tokens.device)
        given["positions"] = counted.expand(tokens.shape)
    mask = given.get("loss_mask", torch.ones_like(tokens, dtype=torch.bool))
    if "targets" not in given:
        given["targets"] = tokens.roll(-1, -1)
        mask = mask.masked_fill(~_has_next(tokens, given.get("segment_ids")), 0)
    given["loss_mask"] = mask
    return given


def _has_next(tokens: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Whether the token after each is of the same document."""
    place = torch.arange(tokens.shape[-1], device=tokens.device)
    found = (place < tokens.shape[-1] - 1).expand(tokens.shape)
    if segment_ids is None:
        return found
    return found & (segment_ids == segment_ids.roll(-1, -1))
