"""Packed rows laid out so that every document begins at a multiple of the chunk's length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the tokens of packed rows stand in longer rows.

    The rest of a document's last chunk repeats its last token. Nothing comes of it: what a
    recurrence makes of a token depends on those before it, and the next chunk begins anew.

    Args:
        place: (*batch, seq), the place of each token in the longer row.
        token: (*batch, length), the token at each place.
        begins: (*batch, length / chunk), whether a chunk begins a document.
    """

    place: Tensor
    token: Tensor
    begins: Tensor

    @classmethod
    def of(cls, starts: Tensor, chunk: int) -> Layout:
        """The layout of rows whose documents begin where `starts`, (*batch, seq), is true.

        How long the rows become depends on values: it is read from the device.
        """
        seq = starts.shape[-1]
        at = torch.arange(seq, device=starts.device).expand(starts.shape)
        first = torch.where(starts, at, 0).cummax(dim=-1).values
        offset = at - first
        opens = offset % chunk == 0  # the first token of each chunk
        place = (opens.cumsum(-1) - 1) * chunk + offset % chunk
        chunks = int(opens.sum(-1).max())
        token = torch.zeros((*starts.shape[:-1], chunks * chunk), dtype=at.dtype, device=at.device)
        token = token.scatter(-1, place, at).cummax(dim=-1).values
        begins = starts.gather(-1, token[..., ::chunk])
        return cls(place, token, begins)

    @property
    def length(self) -> int:
        return self.token.shape[-1]

    def spread(self, x: Tensor) -> Tensor:
        """(*batch, seq, ...) -> (*batch, length, ...)."""
        return _take(x, self.token)

    def collect(self, y: Tensor) -> Tensor:
        """(*batch, length, ...) -> (*batch, seq, ...)."""
        return _take(y, self.place)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x at an index along the dim after the batch."""
    dim = index.ndim - 1
    if dim == 0:
        return x.index_select(0, index)
    rows = x.flatten(0, dim - 1)
    row = torch.arange(rows.shape[0], device=x.device)[:, None]
    taken = rows[row, index.flatten(0, dim - 1)]
    return taken.reshape(*index.shape, *x.shape[dim + 1 :])
