"""Sequence parallelism: what stands between the layers that ranks share, cut over the tokens.

A row-parallel product leaves a sum pending. Instead of every rank having all of it, each takes the
tokens of its part: half of an all-reduce, a reduce-scatter. Norms and residuals then work on these,
token by token, and before the next column-parallel product the tokens are gathered: the other half.
The same bytes are sent, and activations between layers take 1/tp of the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import fx

from compiler.ir import Sym, TensorType
from compiler.placement import REPLICATE, Partial, Placement, Shard
from compiler.rules import TOKENS
from compiler.rules.elementwise import is_elementwise
from funcmodels import ops

# Tokens may be cut anywhere: into as many blocks as there may be ranks.
BLOCKS = 1 << 30

_NORMS = (ops.rms_norm, ops.layer_norm, F.rms_norm, F.layer_norm)
_TOKEN_DIMS = (Sym("seq"), Sym("num_tokens"))


def by_sequence(kind: Any) -> Placement:
    """A floating value cut over its tokens; whole, where it has no dim of them."""
    if not isinstance(kind, TensorType) or not kind.dtype.is_floating_point:
        return REPLICATE
    dims = [dim for dim, size in enumerate(kind.shape) if size in _TOKEN_DIMS]
    return Shard(dims[0], BLOCKS, TOKENS) if len(dims) == 1 else REPLICATE


def is_by_sequence(at: Any) -> bool:
    return isinstance(at, Shard) and at.axis == TOKENS


def seen(node: fx.Node, placements: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """An operation's operands as its sharding rule is to see them.

    Where it works token by token and nothing else of it is cut, pending sums are cut over tokens.
    Elsewhere what is cut over tokens is whole again.
    """
    found = {x: placements[x] for x in node.all_input_nodes}
    if _stays_cut(node, found):
        cuts = {
            x: by_sequence(x.meta["type"]) for x, at in found.items() if isinstance(at, Partial)
        }
        return {**found, **cuts}
    return {x: REPLICATE if is_by_sequence(at) else at for x, at in found.items()}


def _stays_cut(node: fx.Node, found: Mapping[fx.Node, Any]) -> bool:
    if not (is_elementwise(node.target) or node.target in _NORMS):
        return False
    if any(isinstance(at, Shard) and not is_by_sequence(at) for at in found.values()):
        return False
    pending = [x for x, at in found.items() if isinstance(at, Partial)]
    if len(pending) == len(found) > 1:
        return False  # the sum of two pending sums is one
    return any(map(is_by_sequence, found.values())) or any(
        is_by_sequence(by_sequence(x.meta["type"])) for x in pending
    )
