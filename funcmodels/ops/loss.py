"""Cross-entropy of the next token from hidden states, without the logits of all tokens at once."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._C import _functorch as functorch  # type: ignore[attr-defined]

from funcmodels.errors import ShapeError
from funcmodels.ops.loss_function import TokenStats, WeightedLoss
from funcmodels.ops.loss_logits import Logits, Stats, Weights, losses
from funcmodels.ops.primitive import primitive


@primitive
def cross_entropy(
    hidden: Float[Tensor, "*batch seq hidden"],
    table: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "*batch seq"],
    *,
    mask: Bool[Tensor, "*batch seq"] | Float[Tensor, "*batch seq"] | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of `ops.unembed(hidden, table)` with targets.

    x = scale * hidden @ table.T; x = softcap * tanh(x / softcap); lse = log(sum_v exp(x_v))
    loss_n = lse - (1 - label_smoothing) x_target - label_smoothing mean_v(x_v) + z_loss lse**2

    The product is in the dtype of hidden, all else in float32 or better. Only the logits of a chunk
    of tokens exist at a time, forwards and backwards. A sum's or mean's gradient is computed beside
    it; that of each token's loss computes the logits again. It differentiates to any order,
    forwards and backwards, by hidden and table, and vectorises under vmap. Derivatives beyond the
    first hold all logits.

    Args:
        hidden: (*batch, seq, hidden).
        table: (vocab, hidden), cast to the dtype of hidden.
        targets: (*batch, seq) ids in [0, vocab); anything where the mask is False.
        mask: which tokens count, or by how much. The mean is over those; 0 where none counts.
        reduction: of the tokens' losses times the mask.
        chunk: tokens at a time; chosen for about 128 MB unless given.
        label_smoothing: of the target's probability, how much is spread over the vocabulary.
        z_loss: weight of lse**2.
        scale, softcap: of the logits, as models apply them after the unembedding.
    Returns:
        A scalar, or (*batch, seq) for "none"; float32, or float64 where hidden is.
    Raises:
        ShapeError: shapes that do not fit, or options out of range.
    Source: Wijmans et al. 2024, arXiv:2411.09009, and Hsu et al. 2024, arXiv:2410.10989, for the
        chunks; z-loss: Chowdhery et al. 2022, arXiv:2204.02311.
    """
    check_shapes(hidden, table, targets, mask)
    check_options(reduction, chunk, label_smoothing, softcap)
    o = Logits(chunk, float(scale), softcap, label_smoothing != 0)
    weights = Weights(label_smoothing, z_loss)
    flat, table = hidden.reshape(-1, hidden.shape[-1]), table.to(hidden.dtype)
    where, weight = _mask(flat, mask)
    chosen = targets.reshape(-1)
    chosen = (chosen if where is None else torch.where(where, chosen, 0)).long()
    if reduction == "mean":
        total = weight.sum()
        weight = weight / torch.where(total == 0, 1, total)
    if reduction != "none" and _is_known(mask):
        needs = flat.requires_grad, table.requires_grad
        if torch.is_grad_enabled() and any(needs):
            return WeightedLoss.apply(flat, table, chosen, weight, needs, weights, *o)[0]
    each = losses(Stats(*TokenStats.apply(flat, table, chosen, *o)), weights) * weight
    return each.reshape(targets.shape) if reduction == "none" else each.sum()


def _mask(flat: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Which tokens count at all, or None for all of them, and each token's weight; both (n,)."""
    dtype = torch.promote_types(flat.dtype, torch.float32)
    if mask is None:
        return None, torch.ones(flat.shape[0], dtype=dtype, device=flat.device)
    mask = mask.reshape(-1)
    return mask != 0, mask.to(dtype)


def _is_known(mask: Tensor | None) -> bool:
    """Whether `WeightedLoss` can be used: it has no derivative by the weights.

    Nor is it of use right below vmap, where a gradient by a table that all samples share would be
    kept for each of them.
    """
    if mask is not None and mask.is_floating_point():
        return False
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return True
    top = functorch.peek_interpreter_stack()
    return top is None or top.key() != functorch.TransformType.Vmap


def check_shapes(hidden: Tensor, table: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    """What `cross_entropy` is given fits together."""
    if table.dim() != 2 or table.shape[1] != hidden.shape[-1]:
        raise ShapeError(
            "cross_entropy: table must be a matrix that fits the last dim of hidden",
            got=f"hidden {tuple(hidden.shape)}, table {tuple(table.shape)}",
            need=f"table (vocab, {hidden.shape[-1]})",
            fix="table.T"
            if table.dim() == 2 and table.shape[0] == hidden.shape[-1]
            else "the table that `ops.unembed` is given",
        )
    if targets.is_floating_point() or targets.shape != hidden.shape[:-1]:
        raise ShapeError(
            "cross_entropy: targets must hold the id of one token for each hidden state",
            got=f"hidden {tuple(hidden.shape)}, targets {targets.dtype} {tuple(targets.shape)}",
            need=f"targets {tuple(hidden.shape[:-1])} of an integer dtype",
            fix="hidden states without their last token, and tokens without their first",
        )
    if mask is not None and mask.shape != targets.shape:
        raise ShapeError(
            "cross_entropy: mask needs one value per target",
            got=f"mask {tuple(mask.shape)}, targets {tuple(targets.shape)}",
            need=f"mask {tuple(targets.shape)}",
            fix="mask.expand_as(targets)",
        )


def check_options(
    reduction: str, chunk: int | None, label_smoothing: float, softcap: float | None
) -> None:
    """The options of `cross_entropy` are in their ranges."""
    wrong = {
        "reduction": (reduction not in ("mean", "sum", "none"), reduction, "mean, sum or none"),
        "chunk": (chunk is not None and chunk < 1, chunk, "chunk >= 1, or None"),
        "label_smoothing": (not 0 <= label_smoothing <= 1, label_smoothing, "from 0 to 1"),
        "softcap": (softcap is not None and softcap <= 0, softcap, "softcap > 0, or None"),
    }
    for name, (is_wrong, got, need) in wrong.items():
        if is_wrong:
            raise ShapeError(f"cross_entropy: {name} is out of range", got=repr(got), need=need)
