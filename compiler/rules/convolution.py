"""Convolution over time: it mixes tokens, so it is cut by channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from compiler.ir import LocalSize
from compiler.placement import PARTIAL, REPLICATE, Placement, Shard
from compiler.rules.rule import TOKENS, Decision, Exactly, Spelled, Steps, View, rule


@rule(torch.conv1d)
def conv1d(view: View) -> Decision | Spelled | None:
    """x: (*batch, in, time), weight: (out, in/groups, kernel); by channels in, out, or both.

    Depthwise, each rank has its own channels. Ungrouped, a weight cut by rows gives channels of the
    result, and one cut by columns a pending sum.
    """
    x, weight = view.node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    bias = view.arg(2, "bias")
    groups = view.arg(6, "groups", 1)
    channel = len(view.type(x).shape) - 2
    at_x, at_w = view.whole(x), view.whole(weight)
    inputs: dict[fx.Node, Placement] = dict.fromkeys(view.tensors, REPLICATE)
    if not isinstance(at_x, Shard) and not isinstance(at_w, Shard):
        return Decision(inputs, REPLICATE)
    if view.axis == TOKENS:
        return None
    cut_x = isinstance(at_x, Shard) and at_x.dim == channel
    if groups == 1 and isinstance(at_w, Shard) and at_w.dim == 0:
        inputs |= {weight: at_w, **_bias(bias, at_w)}
        return Decision(inputs, Shard(channel, at_w.units, at_w.axis))
    if groups == 1 and isinstance(at_w, Shard) and at_w.dim == 1:
        if at_w.units == 1:
            return None
        if isinstance(bias, fx.Node):
            return _biased_at_last(view, x, weight, bias)
        inputs |= {weight: at_w, x: Shard(channel, at_w.units, at_w.axis)}
        needs = [Exactly(at_w.units, at_w.axis, "it is summed over")]
        return Decision(inputs, PARTIAL, needs=needs)
    shard = at_w if isinstance(at_w, Shard) and at_w.dim == 0 else at_x if cut_x else None
    channels = view.type(x).shape[channel]
    if not isinstance(shard, Shard) or groups != channels or groups % shard.units:
        return None
    own = Shard(0, shard.units, shard.axis)
    inputs |= {x: Shard(channel, own.units, own.axis), weight: own, **_bias(bias, own)}
    out = Shard(channel, own.units, own.axis)
    local = LocalSize(own.units, groups // own.units, own.axis, view.axis)
    args: list[Any] = list(view.node.args)
    kwargs: dict[str, Any] = dict(view.node.kwargs)
    if len(args) > 6:
        args[6] = local
    else:
        kwargs["groups"] = local
    return Decision(inputs, out, tuple(args), kwargs)


def _biased_at_last(view: View, x: fx.Node, weight: fx.Node, bias: fx.Node) -> Spelled:
    """A pending sum of all ranks, and the bias added once to it."""
    stride, padding, dilation = (
        view.arg(i, name, default)
        for i, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    channels = view.type(bias).shape[0]

    def write(steps: Steps) -> fx.Node:
        args = (x, weight, None, stride, padding, dilation)
        made = steps("convolved", torch.conv1d, *args, like=view.node)
        column = steps("column", torch.reshape, bias, (channels, 1), shape=(channels, 1))
        return steps("biased", torch.add, made, column, like=view.node)

    return Spelled(write)


def _bias(bias: object, at: Shard) -> dict[fx.Node, Placement]:
    return {bias: Shard(0, at.units, at.axis)} if isinstance(bias, fx.Node) else {}
