"""Element by element, with broadcasting."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from compiler.placement import PARTIAL, REPLICATE, Partial, Placement, Shard
from compiler.rules.rule import RULES, Decision, Exactly, View, rule
from funcmodels import ops

_LINEAR_UNARY = (torch.neg,)
_UNARY = (
    F.silu, F.gelu, F.softplus, F.leaky_relu, F.elu, F.mish, F.logsigmoid, F.hardtanh, F.relu6,
    torch.abs, torch.exp, torch.log, torch.log1p, torch.expm1, torch.sqrt, torch.rsqrt,
    torch.sigmoid, torch.tanh, torch.relu, torch.sin, torch.cos, torch.reciprocal, torch.square,
    torch.erf, torch.sign, torch.floor, torch.ceil, torch.round, torch.logical_not, torch.clamp,
    torch.isnan, torch.isinf, torch.isfinite, torch.nan_to_num, Tensor.to, torch.detach,
    torch.zeros_like, torch.ones_like, torch.full_like, torch.bitwise_not, torch.clamp_min,
    torch.clamp_max, torch.exp2, torch.log2, torch.log10, torch.tan, torch.atan, torch.sinh,
    torch.cosh, torch.erfc, torch.trunc, F.hardswish, F.hardsigmoid, F.selu, F.celu, F.softsign,
    F.threshold, F.hardshrink, F.softshrink, F.tanhshrink, torch.asin, torch.acos, torch.asinh,
    torch.acosh, torch.atanh, torch.logit, torch.frac, torch.positive, torch.signbit, torch.sinc,
    torch.erfinv, torch.sgn, torch.real, torch.imag, torch.conj, torch.angle, torch.resolve_conj,
    torch.lgamma, torch.digamma, torch.polygamma, torch.deg2rad, torch.rad2deg, torch.i0,
    torch.special.i0e, torch.special.i1, torch.special.i1e, torch.special.ndtr,
    torch.special.ndtri, torch.special.log_ndtr, torch.special.entr, torch.special.erfcx,
)  # fmt: skip
# Derivatives of activations, as torch.func.grad inside a model leaves them.
_aten = torch.ops.aten
_OF_GRADIENTS = (
    _aten.elu.default, _aten.celu.default, _aten.elu_backward.default,
    _aten.gelu_backward.default, _aten.hardswish_backward.default,
    _aten.hardtanh_backward.default, _aten.leaky_relu_backward.default,
    _aten.sigmoid_backward.default, _aten.softplus_backward.default, _aten.tanh_backward.default,
    _aten.threshold_backward.default,
)  # fmt: skip
_BINARY = (
    torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.maximum, torch.minimum,
    torch.floor_divide, torch.remainder, torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge,
    torch.logical_and, torch.logical_or, torch.logical_xor, torch.bitwise_and, torch.bitwise_or,
    torch.bitwise_xor, torch.bitwise_left_shift, torch.bitwise_right_shift, torch.where, torch.lerp,
    torch.masked_fill, torch.addcmul, torch.addcdiv, torch.rsub, torch.fmod, torch.atan2,
    torch.logaddexp, torch.logaddexp2, torch.hypot, torch.copysign, torch.heaviside, torch.xlogy,
    torch.float_power, torch.fmax, torch.fmin, torch.isclose,
    torch.complex, torch.polar, torch.ldexp, torch.gcd, torch.lcm, torch.nextafter,
    torch.special.xlog1py,
    ops.swiglu, ops.geglu,
)  # fmt: skip


@rule(*_UNARY, *_BINARY, *_OF_GRADIENTS)
def elementwise(view: View) -> Decision | None:
    """The first sharded operand decides; the others follow, or are cut: that costs nothing."""
    rank = len(view.type(view.node).shape)
    out: Shard | None = None
    for node in view.tensors:
        at, shape = view.at(node), view.type(node).shape
        dim = at.dim + rank - len(shape) if isinstance(at, Shard) else 0
        if isinstance(at, Shard) and shape[at.dim] == view.type(view.node).shape[dim]:
            out = Shard(dim, at.units, at.axis)
            if at.units > 1:  # else every rank has the one block: better if another is cut
                break
    if out is None:
        return Decision(dict.fromkeys(view.tensors, REPLICATE), REPLICATE)
    inputs: dict[fx.Node, Placement] = {}
    needs: list[Exactly] = []
    for node in view.tensors:
        inputs[node] = REPLICATE
        shape = view.type(node).shape
        dim = out.dim - (rank - len(shape))
        if dim < 0 or shape[dim] == 1:
            continue
        at = view.at(node)
        if isinstance(at, Shard) and at.dim == dim and (at.units > 1 or out.units == 1):
            inputs[node] = at
            if at.units != out.units:
                units = math.gcd(at.units, out.units)
                needs.append(Exactly(units, out.axis, "blocks of two sizes meet"))
                out = Shard(out.dim, units, out.axis)
        else:
            inputs[node] = Shard(dim, out.units, out.axis)
    for node, at in inputs.items():  # an operand that is cut here takes the blocks settled on last
        if isinstance(at, Shard) and at != view.at(node):
            inputs[node] = Shard(at.dim, out.units, out.axis)
    return Decision(inputs, out, needs=needs)


@rule(*_LINEAR_UNARY)
def linear_unary(view: View) -> Decision | None:
    """Negation commutes with a pending sum."""
    (node,) = view.tensors
    if isinstance(view.at(node), Partial):
        return Decision({node: PARTIAL}, PARTIAL)
    return elementwise(view)


def add(view: View) -> Decision | None:
    """The sum of two pending sums is one, pending."""
    if len(view.tensors) == 2 and all(isinstance(view.at(n), Partial) for n in view.tensors):
        return Decision(dict.fromkeys(view.tensors, PARTIAL), PARTIAL)
    return elementwise(view)


RULES[torch.add] = RULES[torch.sub] = add


@rule(torch.bucketize)
def bucketize(view: View) -> Decision | None:
    """Element by element, between boundaries that every rank has."""
    x, *boundaries = view.tensors
    at = view.whole(x)
    return Decision({x: at, **dict.fromkeys(boundaries, REPLICATE)}, at)


@rule(torch.isin)
def isin(view: View) -> Decision | None:
    """Element by element, of a set that every rank has."""
    x, members = view.node.args[:2]
    inputs: dict[fx.Node, Placement] = dict.fromkeys(view.tensors, REPLICATE)
    at = REPLICATE if x is members else view.whole(x)
    if isinstance(x, fx.Node):
        inputs[x] = at
    return Decision(inputs, at)


@rule(torch.searchsorted)
def searchsorted(view: View) -> Decision | None:
    """Element by element, in one row that every rank has, or each in the row of its place."""
    row, x = view.node.args[:2]
    assert isinstance(row, fx.Node)
    inputs: dict[fx.Node, Placement] = dict.fromkeys(view.tensors, REPLICATE)
    rank = len(view.type(row).shape)
    at = REPLICATE if x is row and rank == 1 else view.whole(x)
    if rank > 1 and not isinstance(at, Shard):
        at = view.whole(row)
        if isinstance(at, Shard) and at.dim == rank - 1:
            return None
    if x is row and isinstance(at, Shard) and at.dim == rank - 1:
        return None
    if isinstance(x, fx.Node):
        inputs[x] = at
    if rank > 1 and isinstance(at, Shard) and at.dim < rank - 1:
        inputs |= {n: at for n in view.tensors if n is not x}
    return Decision(inputs, at)


@rule(torch.prelu)
def prelu(view: View) -> Decision | None:
    """A slope for all, or for each index of dim 1, which must be whole then."""
    x, slope = view.node.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(slope, fx.Node)
    at = view.whole(x)
    if isinstance(at, Shard) and at.dim == 1 and view.type(slope).shape not in ((), (1,)):
        return None
    return Decision({x: at, slope: REPLICATE}, at)


def is_elementwise(target: object) -> bool:
    """Whether each element of a function's result is made of the operands' elements there."""
    return RULES.get(target) in (elementwise, linear_unary, add)
