"""Of (batch, channels, *places): what works in each channel, or in each place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from compiler.placement import REPLICATE, Placement, Shard
from compiler.rules.rule import Decision, View, dim_of, rule


@rule(F.instance_norm)
def instance_norm(view: View) -> Decision | None:
    """Over the places of each channel, which must be whole; its weights are cut as channels are."""
    x = view.node.args[0]
    assert isinstance(x, fx.Node)
    given = [view.arg(i, name) for i, name in ((3, "weight"), (4, "bias"))]
    weights = [n for n in given if isinstance(n, fx.Node)]
    at = view.whole(x)
    if len(view.tensors) != len({x, *weights}):  # running statistics
        return None
    if not isinstance(at, Shard):
        return Decision(dict.fromkeys(view.tensors, REPLICATE), REPLICATE)
    if at.dim > 1:
        return None
    own: Placement = Shard(0, at.units, at.axis) if at.dim == 1 else REPLICATE
    return Decision({**dict.fromkeys(weights, own), x: at}, at)


@rule(F.local_response_norm)
def local_response_norm(view: View) -> Decision | None:
    """Over channels beside each other, dim 1."""
    (x,) = view.tensors
    at = view.whole(x)
    return None if isinstance(at, Shard) and at.dim == 1 else Decision({x: at}, at)


@rule(torch.renorm)
def renorm(view: View) -> Decision | None:
    """Each index of one dim is scaled by the norm of all that it has: cut along that dim."""
    (x,) = view.tensors
    at, rank = view.whole(x), len(view.type(x).shape)
    if isinstance(at, Shard) and at.dim != dim_of(view.arg(2, "dim"), rank):
        return None
    return Decision({x: at}, at)


@rule(F.interpolate)
def interpolate(view: View) -> Decision | None:
    """To other places; batch and channels are apart from each other."""
    (x,) = view.tensors
    at = view.whole(x)
    return None if isinstance(at, Shard) and at.dim > 1 else Decision({x: at}, at)


@rule(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
def pool2d(view: View) -> Decision | None:
    """Of rectangles of the last two dims, which must be whole."""
    (x,) = view.tensors
    at = view.whole(x)
    if isinstance(at, Shard) and at.dim >= len(view.type(x).shape) - 2:
        return None
    return Decision({x: at}, at)


@rule(torch.pixel_shuffle, torch.pixel_unshuffle)
def pixel_shuffle(view: View) -> Decision | None:
    """Channels as places, or places as channels: these three dims must be whole."""
    (x,) = view.tensors
    at = view.at(x)
    if isinstance(at, Shard) and at.dim >= len(view.type(x).shape) - 3:
        return None
    return Decision({x: at}, at)
