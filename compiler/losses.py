"""A model of each token's loss in place of logits, so that the loss is part of its program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from funcmodels.errors import ShapeError
from funcmodels.loss import entries, loss_of
from funcmodels.ops.deferred import deferring
from funcmodels.pooling import check_task
from funcmodels.spec import Model


class LossOptions(NamedTuple):
    """As of `ops.cross_entropy`."""

    chunk: int | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


@functools.lru_cache(maxsize=32)
def model_of_losses(model: Model, options: LossOptions) -> Model:
    """The model whose forward gives (*batch, seq, 1): of each token, the loss of the next one.

    That of a row's last token is of its first, and counts for nothing: callers mask it.
    """
    check_task(model, "generate")

    def forward(params, tokens, positions, segment_ids=None):
        with deferring():
            logits = model.forward(params, tokens, positions, segment_ids)
        targets = tokens.roll(-1, -1)
        each = loss_of(logits, targets, None, reduction="none", **options._asdict())
        return each[..., None]

    return dataclasses.replace(model, forward=forward)


def next_tokens(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch with positions and loss_mask, whose targets are the tokens that follow.

    Raises:
        ShapeError: it brings targets of its own, which a program that shifts tokens cannot use.
    """
    if "targets" in batch:
        raise ShapeError(
            "loss: on a mesh, a token's target is the token after it",
            got="a batch with targets",
            need="tokens, of which each is the target of the one before",
            fix="fm.pack(documents, length); or CompiledModel.pure, and a loss of its logits",
        )
    return entries(batch)
