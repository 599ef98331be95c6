"""`fm.pack`: documents of any lengths as rows of one length."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcmodels.errors import ShapeError

PADDING_SEGMENT = -1


def pack(
    documents: Iterable[Sequence[int] | Tensor], length: int, *, pad: int = 0
) -> dict[str, Tensor]:
    """Lay documents side by side into rows.

    Each goes where the least room is left that it fits into, in the order given; one longer than a
    row is cut into rows of its own, as if each piece were a document, so that no piece sees the one
    before it. Within a row no document sees another, given `segment_ids`, and none has a loss for
    the first token of the next, given `loss_mask`.

    Args:
        documents: token ids of each; empty ones are left out.
        length: tokens of a row, the padding at its end included.
        pad: the token of the padding, which no document sees.
    Returns:
        Tensors (rows, length): tokens int64; positions int64, from 0 in each document; segment_ids
        int64, from 0 in each row, -1 for padding; loss_mask bool, whether the token after this one
        is the same document's.
    Raises:
        ShapeError: a row of fewer than two tokens, or a document that is not a sequence of ids.
    """
    if length < 2:
        raise ShapeError(
            "pack: a row must hold a token and the one after it",
            got=f"length={length}",
            need="length >= 2",
            fix="fm.pack(documents, 512)",
        )
    rows = _rows([piece for document in documents for piece in _pieces(document, length)], length)
    out = {
        "tokens": torch.full((len(rows), length), pad),
        "positions": torch.arange(length).repeat(len(rows), 1),
        "segment_ids": torch.full((len(rows), length), PADDING_SEGMENT),
        "loss_mask": torch.zeros(len(rows), length, dtype=torch.bool),
    }
    for i, row in enumerate(rows):
        start = 0
        for number, ids in enumerate(row):
            end = start + len(ids)
            out["tokens"][i, start:end] = ids
            out["positions"][i, start:] = torch.arange(length - start)
            out["segment_ids"][i, start:end] = number
            out["loss_mask"][i, start : end - 1] = True
            start = end
        out["positions"][i, start:] = torch.arange(length - start)
    return out


def _pieces(document: Any, length: int) -> list[Tensor]:
    """A document as tensors of at most `length` ids."""
    if isinstance(document, str):
        raise ShapeError(
            "pack: a document is a sequence of token ids",
            got=f"a str, {document[:20]!r}",
            need="integers (tokens,)",
            fix="a tokenizer first: fm.pack([tokenizer.encode(text) for text in texts], length)",
        )
    ids = torch.as_tensor(document)
    if ids.dim() != 1 or (ids.is_floating_point() and len(ids)):
        raise ShapeError(
            "pack: a document is a sequence of token ids",
            got=f"{ids.dtype} {tuple(ids.shape)}",
            need="integers (tokens,)",
            fix="fm.pack([document], length) for one document"
            if ids.dim() == 0
            else "fm.pack(list(documents), length)",
        )
    return list(ids.long().split(length)) if len(ids) else []


def _rows(pieces: list[Tensor], length: int) -> list[list[Tensor]]:
    """Each piece into the fullest row that has room for it."""
    rows: list[list[Tensor]] = []
    free: list[tuple[int, int]] = []  # (room, row), sorted, of the rows that have any
    for piece in pieces:
        at = bisect.bisect_left(free, (len(piece), -1))
        if at < len(free):
            room, row = free.pop(at)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(piece)
        if room > len(piece):
            bisect.insort(free, (room - len(piece), row))
    return rows
