"""A step's requests as recurrences see them, for emitted files to carry along."""

from __future__ import annotations

from typing import Any


class BatchedRequests:
    """Where a step's requests have their states and tokens: found once, for all layers of a kind.

    The engine puts requests with one token before others.

    Args:
        source: the engine's places.
        num_decodes: how many requests have one token, of those before the first that has more.
        prompts: first token and the one after the last of each other request.
        num_tokens: of all requests.
        places: of all requests, int64; `decodes`: of the first num_decodes, `decodes_int32` too.
        new: places of requests that have only begun.
        begins: where the tokens of prompts begin and end, counted from the first of them.
    """

    def __init__(self, metadata: Any) -> None:
        starts = metadata.query_start_loc.tolist()
        spans = [(starts[i], starts[i + 1]) for i in range(len(starts) - 1)]
        lengths = [last - first for first, last in spans]
        n = next((i for i, length in enumerate(lengths) if length != 1), len(lengths))
        self.source = metadata.state_indices_tensor
        self.num_decodes, self.num_tokens = n, starts[-1]
        self.prompts = spans[n:]
        self.places = self.source[: len(lengths)].long()
        self.decodes = self.places[:n]
        self.decodes_int32 = self.decodes.int()
        seen = zip(metadata.seq_lens.tolist(), lengths, self.places.tolist(), strict=False)
        self.new = [place for total, length, place in seen if total == length]
        self.begins = metadata.query_start_loc[n : len(lengths) + 1].int() - n


def batch_of(metadata: Any) -> BatchedRequests:
    """That of the engine's metadata, which all layers of a kind are given."""
    found = getattr(metadata, "batched_requests", None)
    if found is None or found.source is not metadata.state_indices_tensor:
        found = metadata.batched_requests = BatchedRequests(metadata)
    return found
