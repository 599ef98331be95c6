"""Reductions, and what works along a dim."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import fx

from compiler.ir import LocalSize
from compiler.placement import PARTIAL, REPLICATE, Placement, Shard
from compiler.rules.elementwise import elementwise
from compiler.rules.local import share_of_mean
from compiler.rules.rule import TOKENS, Decision, Exactly, View, dim_of, rule


@rule(torch.sum)
def sum_(view: View) -> Decision | None:
    """Over the cut dim it is a pending sum."""
    x = view.tensors[0]
    found = _reduced(view, x)
    if found is not None:
        return found
    at = view.at(x)
    assert isinstance(at, Shard)
    if at.units == 1:
        return Decision({x: REPLICATE}, REPLICATE)
    needs = [Exactly(at.units, at.axis, "it is summed over")]
    return Decision({x: at}, PARTIAL, needs=needs)


# Where `dim` stands among the arguments, if not second.
_DIM_AT = {
    torch.norm: 2, torch.linalg.vector_norm: 2, torch.topk: 2, torch.roll: 2, F.normalize: 2,
    torch.diff: 2, torch.kthvalue: 2, torch.take_along_dim: 2, torch.quantile: 2,
    torch.nanquantile: 2,
}  # fmt: skip
# And which it is where it is not given; None for all of them.
_DIM_IS = {
    torch.sort: -1, torch.argsort: -1, torch.topk: -1, F.glu: -1, F.normalize: 1, torch.diff: -1,
    torch.kthvalue: -1, torch.msort: 0,
}  # fmt: skip
# Transforms of one dim, of the last two, of all; and shifts of all.
_FFT = [getattr(torch.fft, name) for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")]
_FFT2 = (torch.fft.fft2, torch.fft.ifft2, torch.fft.rfft2, torch.fft.irfft2)
_FFTN = (torch.fft.fftn, torch.fft.ifftn, torch.fft.rfftn, torch.fft.irfftn)
_SHIFTS = (torch.fft.fftshift, torch.fft.ifftshift)
_DIM_AT |= dict.fromkeys((*_FFT, *_FFT2, *_FFTN), 2)
_DIM_IS |= dict.fromkeys(_FFT, -1) | dict.fromkeys(_FFT2, (-2, -1))


@rule(torch.mean)
def mean(view: View) -> Decision | None:
    """Over the cut dim alone, each rank's share is a term of a pending sum."""
    x = view.tensors[0]
    found = _reduced(view, x)
    at, rank = view.whole(x), len(view.type(x).shape)
    if found is not None or view.axis == TOKENS or not isinstance(at, Shard) or at.units == 1:
        return found
    dims = view.arg(1, "dim")
    (dim, *more) = [dims] if isinstance(dims, int) else dims or (0, 0)
    if more or set(view.node.kwargs) - {"dim", "keepdim"} or dim_of(dim, rank) != at.dim:
        return None
    count = view.type(x).shape[at.dim]
    assert isinstance(count, int)
    part = LocalSize(at.units, count // at.units, at.axis, view.axis)
    args = (x, at.dim, bool(view.arg(2, "keepdim", False)), part, count)
    needs = [Exactly(at.units, at.axis, "it is averaged over")]
    return Decision({x: at}, PARTIAL, args, {}, share_of_mean, needs)


@rule(torch.amax, torch.amin, torch.logsumexp, torch.var, torch.std, torch.prod,
      torch.max, torch.min, torch.argmax, torch.argmin, torch.any, torch.all, torch.norm,
      torch.linalg.vector_norm, torch.median, torch.aminmax, torch.count_nonzero,
      torch.var_mean, torch.std_mean, torch.nansum, torch.nanmean, torch.nanmedian, torch.mode,
      torch.quantile, torch.nanquantile)  # fmt: skip
def reduction(view: View) -> Decision | None:
    """Along other dims than the cut one."""
    if view.node.target in (torch.quantile, torch.nanquantile):  # several add a dim
        if not isinstance(view.arg(1, "q"), float):
            return None
    elif len(view.tensors) > 1:  # torch.max(x, y) is torch.maximum
        return elementwise(view)
    return _reduced(view, view.tensors[0])


def _reduced(view: View, x: fx.Node) -> Decision | None:
    """A reduction that leaves the cut dim, or None where it goes over it."""
    at, rank = view.whole(x), len(view.type(x).shape)
    count = len(types) if isinstance(types := view.node.meta["type"], tuple) else None
    if not isinstance(at, Shard):
        return Decision({x: at}, at if count is None else (at,) * count)
    dims = view.arg(_DIM_AT.get(view.node.target, 1), "dim")
    if dims is None or dims in ((), []):  # of none given, most go over all
        return None
    gone = {dim_of(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    if at.dim in gone:
        return None
    types = view.node.meta["type"]
    first = types[0] if isinstance(types, tuple) else types
    keep = len(first.shape) == rank
    out = Shard(at.dim if keep else at.dim - sum(d < at.dim for d in gone), at.units, at.axis)
    return Decision({x: at}, (out,) * len(types) if isinstance(types, tuple) else out)


_ALONG_DIM = (
    torch.softmax, torch.log_softmax, F.log_softmax, torch.cumsum, torch.cumprod, torch.flip,
    torch.roll, torch.sort, torch.argsort, torch.topk, torch.gather, torch.take_along_dim,
    torch.cummax, torch.cummin, torch.logcumsumexp, torch.scatter, torch.scatter_add, F.softmin,
    F.glu, F.normalize, torch.diff, torch.kthvalue, torch.scatter_reduce, torch.msort, *_FFT,
    *_FFT2, *_FFTN, *_SHIFTS,
)  # fmt: skip


@rule(*_ALONG_DIM)
def along_dim(view: View) -> Decision | None:
    """The dims that are left whole keep their places; the cut one must be among them."""
    x, *rest = view.tensors
    at, rank = view.whole(x), len(view.type(x).shape)
    i, default = (table.get(view.node.target) for table in (_DIM_AT, _DIM_IS))
    dims = view.arg(i or 1, "dim", view.node.kwargs.get("dims", default))
    dims = [dims] if isinstance(dims, int) else dims
    once: set[fx.Node] = set()
    if isinstance(at, Shard):
        if dims is None or at.dim in {dim_of(d, rank) for d in dims}:
            return None
        if view.node.target is torch.take_along_dim:  # with broadcasting
            once = {n for n in rest if view.type(n).shape[at.dim] == 1}
        elsewhere = [n for n in rest if n not in once]
        if any(view.type(n).shape[at.dim] != view.type(x).shape[at.dim] for n in elsewhere):
            return None  # an index may take fewer
    types = view.node.meta["type"]
    first = types[0] if isinstance(types, tuple) else types
    put = at
    if isinstance(at, Shard) and len(first.shape) < rank:  # kthvalue takes its dim away
        put = Shard(at.dim - sum(dim_of(d, rank) < at.dim for d in dims), at.units, at.axis)
    out = (put,) * len(types) if isinstance(types, tuple) else put
    inputs: dict[fx.Node, Placement] = {n: REPLICATE if n in once else at for n in rest}
    return Decision({**inputs, x: at}, out)


@rule(
    torch.ops.aten._softmax_backward_data.default, torch.ops.aten._log_softmax_backward_data.default
)
def gradient_of_softmax(view: View) -> Decision | None:
    """Of a cotangent and a softmax, over a dim that must be whole."""
    found = elementwise(view)
    dim = dim_of(view.node.args[2], len(view.type(view.node).shape))  # type: ignore[arg-type]
    over_cut = found is None or (isinstance(found.output, Shard) and found.output.dim == dim)
    return None if over_cut else found


@rule(F.cosine_similarity)
def cosine_similarity(view: View) -> Decision | None:
    """Along other dims than the cut one, of two tensors of one shape."""
    x, y = view.tensors if len(view.tensors) == 2 else view.tensors * 2
    rank = len(view.type(x).shape)
    dim = dim_of(view.arg(2, "dim", 1), rank)
    at = next((a for a in map(view.whole, (x, y)) if isinstance(a, Shard)), view.whole(x))
    if not isinstance(at, Shard):
        return Decision(dict.fromkeys((x, y), at), at)
    if at.dim == dim or view.type(x).shape != view.type(y).shape:
        return None
    out = Shard(at.dim - (dim < at.dim), at.units, at.axis)
    return Decision(dict.fromkeys((x, y), at), out)


@rule(F.group_norm)
def group_norm(view: View) -> Decision | None:
    """Over groups of the channels, dim 1, and all dims after it: cut between groups."""
    x, groups = view.node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(groups, int)
    at, channels = view.whole(x), view.type(x).shape[1]
    inputs: dict[fx.Node, Placement] = {**dict.fromkeys(view.tensors, REPLICATE), x: at}
    if not isinstance(at, Shard) or at.dim == 0:
        return Decision(inputs, at)
    of_weights = {n: p for n in view.tensors[1:] if isinstance(p := view.at(n), Shard)}
    units = math.gcd(at.units, groups, *(p.units for p in of_weights.values()))
    if at.dim > 1 or view.axis == TOKENS or units == 1 < at.units or not isinstance(channels, int):
        return None
    same = {at.units, *(p.units for p in of_weights.values())} == {units}
    needs = [] if same else [Exactly(units, at.axis, f"it is of {groups} groups")]
    own = LocalSize(units, groups // units, at.axis, view.axis)
    inputs |= {n: of_weights.get(n, Shard(0, at.units, at.axis)) for n in view.tensors[1:]}
    args = (x, own, *view.node.args[2:])
    return Decision(inputs, Shard(1, units, at.axis), args, needs=needs)


@rule(torch.avg_pool1d, F.max_pool1d, F.max_pool1d_with_indices, torch.adaptive_avg_pool1d,
      F.adaptive_max_pool1d, F.adaptive_max_pool1d_with_indices, F.lp_pool1d)  # fmt: skip
def pool(view: View) -> Decision | None:
    """Of stretches of the last dim, which must be whole."""
    (x,) = view.tensors
    at = view.whole(x)
    if isinstance(at, Shard) and at.dim == len(view.type(x).shape) - 1:
        return None
    types = view.node.meta["type"]
    return Decision({x: at}, (at,) * len(types) if isinstance(types, tuple) else at)


@rule(F.rms_norm, F.layer_norm)
def functional_norm(view: View) -> Decision | None:
    """Over the last dims, which must be whole."""
    x, *rest = view.tensors
    at, rank = view.whole(x), len(view.type(x).shape)
    if isinstance(at, Shard) and at.dim >= rank - len(view.arg(1, "normalized_shape")):
        return None
    return Decision({x: at, **dict.fromkeys(rest, REPLICATE)}, at)
