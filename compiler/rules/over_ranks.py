"""Operations over the cut dim itself, spelled in steps of which each has a rule of its own.

    softmax(x)  ->  exps = exp(x - max over ranks); exps / all_reduce(sum(exps))

Only a row's maximum and its sums go between ranks, and never its elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from compiler.placement import REPLICATE, Shard
from compiler.rules.elementwise import elementwise
from compiler.rules.local import max_over_ranks, more_than_zero, widened
from compiler.rules.rule import (
    RULES,
    TOKENS,
    Decision,
    Rule,
    Spelled,
    Steps,
    View,
    dim_of,
    rule,
)
from funcmodels import ops

# The steps of an operation over a dim: (steps, view, x in float32 at least, dim) -> the result.
Spelling = Callable[[Steps, View, fx.Node, int], fx.Node | None]

RULES[widened] = RULES[more_than_zero] = elementwise


@rule(max_over_ranks)
def most_over_ranks(view: View) -> Decision | None:
    """Whole on every rank."""
    (x,) = view.tensors
    return Decision({x: view.at(x)}, REPLICATE)


def spelled(*targets: Any, dim_at: int = 1, default: int | None = None) -> Callable:
    """Spell operations where they go over the cut dim alone; elsewhere their other rule decides.

    Args:
        dim_at: where `dim` stands among the arguments.
        default: which it is where it is not given.
    """

    def register(spelling: Spelling) -> Spelling:
        for target in targets:
            RULES[target] = _over_the_cut(spelling, RULES[target], dim_at, default)
        return spelling

    return register


def _over_the_cut(spelling: Spelling, other: Rule, dim_at: int, default: int | None) -> Rule:
    def chosen(view: View) -> Decision | Spelled | None:
        x = view.tensors[0]
        at, rank = view.at(x), len(view.type(x).shape)
        dims = view.arg(dim_at, "dim", default)
        dims = [dims] if isinstance(dims, int) else dims
        is_over = (
            isinstance(at, Shard)
            and at.units > 1
            and view.axis != TOKENS
            and isinstance(dims, (tuple, list))
            and [dim_of(d, rank) for d in dims] == [at.dim]
            and not isinstance(view.node.meta["type"], tuple)
        )
        if not is_over:
            return other(view)
        dim = at.dim  # type: ignore[union-attr]
        return Spelled(lambda steps: spelling(steps, view, x, dim))

    return chosen


def _kept(steps: Steps, view: View, value: fx.Node, dim: int, at: int = 2) -> fx.Node:
    """A reduced value, without the dim unless it is to be kept; in the result's dtype."""
    value = steps.cast(value, view.type(view.node).dtype)
    if view.arg(at, "keepdim", False):
        return value
    return steps("reduced", torch.squeeze, value, dim, like=view.node)


def _top(steps: Steps, x: fx.Node, dim: int) -> fx.Node:
    """The largest elements, as numbers: what is subtracted and added again has no gradient."""
    return steps(
        "most", max_over_ranks, steps("x", torch.detach, x), dim, False, steps.axis, over=dim
    )


def _exps(steps: Steps, view: View, x: fx.Node, dim: int) -> tuple[fx.Node, fx.Node, fx.Node]:
    """x less its largest, the exponentials of that, and their sum."""
    dtype: Any = view.node.kwargs.get("dtype", view.type(x).dtype)
    wide = steps.wide(steps.cast(x, dtype))
    shifted = steps("shifted", torch.sub, wide, _top(steps, wide, dim))
    exps = steps("exps", torch.exp, shifted)
    return shifted, exps, steps("total", torch.sum, exps, dim, True, over=dim)


@spelled(torch.softmax)
def softmax(steps: Steps, view: View, x: fx.Node, dim: int) -> fx.Node:
    _, exps, total = _exps(steps, view, x, dim)
    return steps.cast(steps("shares", torch.div, exps, total), view.type(view.node).dtype)


@spelled(torch.log_softmax, F.log_softmax)
def log_softmax(steps: Steps, view: View, x: fx.Node, dim: int) -> fx.Node:
    shifted, _, total = _exps(steps, view, x, dim)
    logs = steps("logs", torch.sub, shifted, steps("log", torch.log, total))
    return steps.cast(logs, view.type(view.node).dtype)


@spelled(torch.logsumexp)
def logsumexp(steps: Steps, view: View, x: fx.Node, dim: int) -> fx.Node:
    wide = steps.wide(x)
    top = _top(steps, wide, dim)
    infinite = steps("infinite", torch.isinf, top, dtype=torch.bool)
    top = steps("most", torch.where, infinite, 0.0, top, like=top)  # inf - inf is no number
    exps = steps("exps", torch.exp, steps("shifted", torch.sub, wide, top))
    total = steps("total", torch.sum, exps, dim, True, over=dim)
    return _kept(steps, view, steps("logs", torch.add, steps("log", torch.log, total), top), dim)


@spelled(torch.amax, torch.amin)
def amax(steps: Steps, view: View, x: fx.Node, dim: int) -> fx.Node:
    least = view.node.target is torch.amin
    name = "least" if least else "most"
    found = steps(name, max_over_ranks, x, dim, least, steps.axis, over=dim)
    return _kept(steps, view, found, dim)


@spelled(torch.any, torch.all)
def any_(steps: Steps, view: View, x: fx.Node, dim: int) -> fx.Node:
    holds = steps("holds", torch.ne, x, 0, dtype=torch.bool)
    least = view.node.target is torch.all
    found = steps("found", max_over_ranks, holds, dim, least, steps.axis, over=dim)
    return _kept(steps, view, found, dim)


@spelled(torch.argmax, torch.argmin)
def argmax(steps: Steps, view: View, x: fx.Node, dim: int) -> fx.Node:
    """The first of the places where the largest is, or what is no number."""
    least = view.node.target is torch.argmin
    shape = view.type(x).shape
    count = shape[dim]
    held = steps("x", torch.detach, x)
    top = steps("most", max_over_ranks, held, dim, least, steps.axis, over=dim)
    same = steps("same", torch.eq, held, top, dtype=torch.bool)
    if view.type(x).dtype.is_floating_point:
        unknown = steps("unknown", torch.isnan, held, dtype=torch.bool)
        same = steps("same", torch.logical_or, same, unknown, dtype=torch.bool)
    line = (count, *(1 for _ in shape[dim + 1 :]))
    places = steps("places", torch.arange, count, dtype=torch.int64, shape=(count,))
    if len(line) > 1:
        places = steps("places", torch.reshape, places, line, shape=line)
    found = steps("places", torch.where, same, places, count, dtype=torch.int64, like=same)
    first = steps("first", max_over_ranks, found, dim, True, steps.axis, over=dim)
    return _kept(steps, view, first, dim)


@spelled(torch.var, torch.std)
def var(steps: Steps, view: View, x: fx.Node, dim: int) -> fx.Node | None:
    count: Any = view.type(x).shape[dim]
    unbiased = view.arg(2, "unbiased", True)
    free = count - view.node.kwargs.get("correction", 1 if unbiased else 0)
    wide = steps.wide(x)
    mean = steps("mean", torch.mean, wide, dim, True, over=dim)
    square = steps("square", torch.square, steps("centred", torch.sub, wide, mean))
    total = steps("total", torch.sum, square, dim, True, over=dim)
    found = steps("variance", torch.div, total, free)
    if view.node.target is torch.std:
        found = steps("deviation", torch.sqrt, found)
    return _kept(steps, view, found, dim, at=3)


def _length(steps: Steps, wide: fx.Node, dim: int) -> fx.Node:
    square = steps("square", torch.square, wide)
    total = steps("total", torch.sum, square, dim, True, over=dim)
    return steps("length", torch.sqrt, total)


@spelled(torch.norm, torch.linalg.vector_norm, dim_at=2)
def norm(steps: Steps, view: View, x: fx.Node, dim: int) -> fx.Node | None:
    order = view.arg(1, "p" if view.node.target is torch.norm else "ord", 2)
    if order not in (2, "fro") or "dtype" in view.node.kwargs:
        return None
    return _kept(steps, view, _length(steps, steps.wide(x), dim), dim, at=3)


@spelled(F.normalize, dim_at=2, default=1)
def normalize(steps: Steps, view: View, x: fx.Node, dim: int) -> fx.Node | None:
    if view.arg(1, "p", 2.0) != 2:
        return None
    wide = steps.wide(x)
    length = steps("length", torch.clamp_min, _length(steps, wide, dim), view.arg(3, "eps", 1e-12))
    return steps.cast(steps("unit", torch.div, wide, length), view.type(view.node).dtype)


def _layer_norm(
    steps: Steps, view: View, x: fx.Node, weight: Any, bias: Any, eps: float
) -> fx.Node:
    dtype, dim = view.type(x).dtype, len(view.type(x).shape) - 1
    wide = steps.wide(x)
    centred = steps(
        "centred", torch.sub, wide, steps("mean", torch.mean, wide, dim, True, over=dim)
    )
    square = steps("square", torch.square, centred)
    variance = steps("variance", torch.mean, square, dim, True, over=dim)
    scale = steps("scale", torch.rsqrt, steps("variance", torch.add, variance, eps))
    found = steps("unit", torch.mul, centred, scale)
    if isinstance(weight, fx.Node):
        found = steps("scaled", torch.mul, found, steps.cast(weight, dtype))
    if isinstance(bias, fx.Node):
        found = steps("shifted", torch.add, found, steps.cast(bias, dtype))
    return steps.cast(found, dtype)


def _spelled_norm(view: View, other: Rule, arguments: tuple[Any, Any, Any]) -> Any:
    x = view.tensors[0]
    at, rank = view.at(x), len(view.type(x).shape)
    is_over = isinstance(at, Shard) and at.dim == rank - 1 and at.units > 1
    if not is_over or view.axis == TOKENS:
        return other(view)
    return Spelled(lambda steps: _layer_norm(steps, view, x, *arguments))


_ops_layer_norm, _functional_layer_norm = RULES[ops.layer_norm], RULES[F.layer_norm]


def layer_norm(view: View) -> Any:
    weight, bias = view.arg(1, "weight"), view.arg(2, "bias")
    return _spelled_norm(view, _ops_layer_norm, (weight, bias, view.node.kwargs["eps"]))


def functional_layer_norm(view: View) -> Any:
    if len(view.arg(1, "normalized_shape")) > 1:
        return _functional_layer_norm(view)
    weight, bias, eps = view.arg(2, "weight"), view.arg(3, "bias"), view.arg(4, "eps", 1e-5)
    return _spelled_norm(view, _functional_layer_norm, (weight, bias, eps))


RULES[ops.layer_norm], RULES[F.layer_norm] = layer_norm, functional_layer_norm


def _rms_norm(steps: Steps, view: View, x: fx.Node, weight: Any, eps: float | None) -> fx.Node:
    """As torch does it: the weight is multiplied in float32 too, and rounding comes last."""
    dim = len(view.type(x).shape) - 1
    wide = steps.wide(x)
    square = steps("square", torch.square, wide)
    mean = steps("mean", torch.mean, square, dim, True, over=dim)
    added = (more_than_zero, mean) if eps is None else (torch.add, mean, eps)
    scale = steps("scale", torch.rsqrt, steps("mean", *added))
    found = steps("unit", torch.mul, wide, scale)
    if isinstance(weight, fx.Node):
        found = steps("scaled", torch.mul, found, steps.wide(weight))
    return steps.cast(found, view.type(view.node).dtype)


_whole_rms_norm = RULES[F.rms_norm]


def functional_rms_norm(view: View) -> Any:
    """Over the cut dim the ranks sum their squares."""
    weight, eps = view.arg(2, "weight"), view.arg(3, "eps")
    x = view.tensors[0]
    at, rank = view.at(x), len(view.type(x).shape)
    is_over = isinstance(at, Shard) and at.dim == rank - 1 and at.units > 1
    several = len(view.arg(1, "normalized_shape")) > 1
    if several or not is_over or view.axis == TOKENS:
        return _whole_rms_norm(view)
    return Spelled(lambda steps: _rms_norm(steps, view, x, weight, eps))


RULES[F.rms_norm] = functional_rms_norm
