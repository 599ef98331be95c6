"""The two ends of a language model: token ids to vectors, and vectors to logits."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from funcmodels.errors import ShapeError
from funcmodels.ops import deferred, embed_rows
from funcmodels.ops.primitive import primitive


@primitive
def embed(
    tokens: Int[Tensor, "*batch seq"], table: Float[Tensor, "vocab hidden"]
) -> Float[Tensor, "*batch seq hidden"]:
    """The rows of a table: y = table[tokens].

    Args:
        tokens: (*batch, seq), ids in [0, vocab).
        table: (vocab, hidden).
    Returns:
        (*batch, seq, hidden), dtype of table.
    Raises:
        ShapeError: table is not a matrix, or tokens are not integers.
    """
    _check_table("embed", table)
    if tokens.is_floating_point() or tokens.is_complex():
        raise ShapeError(
            "embed: tokens are ids",
            got=f"tokens {tokens.dtype}",
            need="an integer dtype",
            fix="tokens.long(), or pass the arguments as embed(tokens, table)",
        )
    return embed_rows.embed(tokens, table)


def _put_off(x: Tensor, table: Tensor) -> deferred.Deferred | None:
    """For `fm.loss`, logits that are not computed yet."""
    found = deferred.defer(x, table, unembed)
    if found is not None:
        _check_unembed(x, table)
    return found


@primitive(instead=_put_off)
def unembed(
    x: Float[Tensor, "*batch seq hidden"], table: Float[Tensor, "vocab hidden"]
) -> Float[Tensor, "*batch seq vocab"]:
    """Logits over the vocabulary: y = x @ table.T.

    Args:
        x: (*batch, seq, hidden).
        table: (vocab, hidden): the embedding's own where the two are tied. Cast to x's dtype.
    Returns:
        (*batch, seq, vocab), dtype of x.
    Raises:
        ShapeError: table is not (vocab, x.shape[-1]).
    """
    _check_unembed(x, table)
    return F.linear(x, table.to(x.dtype))


def _check_unembed(x: Tensor, table: Tensor) -> None:
    _check_table("unembed", table)
    if table.shape[1] != x.shape[-1]:
        raise ShapeError(
            "unembed: x and table differ in their last dim",
            got=f"x {tuple(x.shape)}, table {tuple(table.shape)}",
            need=f"table (vocab, {x.shape[-1]})",
            fix="table.T" if table.shape[0] == x.shape[-1] else "the axis hidden on both",
        )


def _check_table(op: str, table: Tensor) -> None:
    if table.dim() != 2:
        raise ShapeError(
            f"{op}: table must be a matrix",
            got=f"table {tuple(table.shape)}",
            need="table (vocab, hidden)",
            fix='declare it as P("vocab hidden")',
        )
