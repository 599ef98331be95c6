"""Where packed documents begin: what kernels for sequences of many lengths want of segment_ids."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Documents(NamedTuple):
    """The runs of equal ids of all rows, in one flat order of tokens."""

    starts: Tensor  # (documents + 1,) int32: the first token of each, and the number of tokens
    longest: int  # the most tokens of one


# Reading the number of documents waits for the device, so it is done once a batch, not once a
# layer: all layers are given the same tensor. Weak keys: an entry dies with its segment_ids.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def documents(segment_ids: Tensor, batch: torch.Size) -> Documents | None:
    """The documents of segment_ids (*batch or 1s, seq), or None where they are no runs of tokens.

    They are none where an id comes back after another one in the same row, and where a CUDA graph
    is being captured: its replays would keep the documents of the capture.
    """
    if segment_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    key = (_version(segment_ids), tuple(batch))
    known = _known.get(segment_ids)
    if known is None or key[0] is None or known[0] != key:
        known = key, _find(segment_ids.expand(*batch, segment_ids.shape[-1]))
        _known[segment_ids] = known
    return known[1]


def _version(t: Tensor) -> int | None:
    """How often t was written to; None where torch does not count."""
    return None if t.is_inference() else t._version


def _find(ids: Tensor) -> Documents | None:
    """The documents of ids (*batch, seq), seq not 0."""
    ids = ids.reshape(-1, ids.shape[-1])
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    ordered = ids.sort(dim=-1).values
    different = (ordered[:, 1:] != ordered[:, :-1]).sum() + len(ids)  # ids, summed over rows
    starts = torch.cat((is_first.flatten().nonzero()[:, 0], ids.new_tensor([ids.numel()]).long()))
    count, longest = torch.stack((different, starts.diff().max())).tolist()
    if count != len(starts) - 1:
        return None
    return Documents(starts.int(), longest)
