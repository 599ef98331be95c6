"""Products of groups of rows with a matrix each: what experts are made of.

`grouped_linear` and `grouped_outer` are bilinear, and each is the other's derivative, so that two
`torch.autograd.Function`s are closed under grad, jvp and vmap, in any nesting. Group g is the rows
from `bounds[g, 0]` to `bounds[g, 1]`, in any order, without overlap, and has the matrix
g % matrices, which is how vmap puts its samples side by side. Rows of no group give zeros.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from funcmodels.ops.forward_mode import outer_tangents, values


def grouped_linear(rows: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
    """y[i] = weight[g % matrices] @ rows[i], for the rows i of each group g.

    Args:
        rows: (n, inner).
        weight: (matrices, outer, inner), of the same dtype; any strides.
        bounds: (groups, 2), first row and the one after the last of each group.
    Returns:
        (n, outer), dtype of rows.
    """
    return _Linear.apply(rows, weight, bounds)  # type: ignore[return-value]


def grouped_outer(left: Tensor, right: Tensor, bounds: Tensor, matrices: int) -> Tensor:
    """y[m] = sum over the rows i of the groups g with g % matrices == m of left[i] right[i]^T.

    Args:
        left: (n, outer).
        right: (n, inner), of the same dtype.
        bounds: (groups, 2).
        matrices: how many sums there are.
    Returns:
        (matrices, outer, inner), dtype of left.
    """
    return _Outer.apply(left, right, bounds, matrices)  # type: ignore[return-value]


def _linear(rows: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for g, (start, end) in enumerate(bounds.tolist()):
        if start < end:
            torch.mm(rows[start:end], weight[g % len(weight)].mT, out=out[start:end])
    return out


def _outer(left: Tensor, right: Tensor, bounds: Tensor, matrices: int) -> Tensor:
    out = left.new_zeros(matrices, left.shape[1], right.shape[1])
    for g, (start, end) in enumerate(bounds.tolist()):
        if start < end:
            out[g % matrices].addmm_(left[start:end].mT, right[start:end])
    return out


def _operator(schema: str, fn, fake):
    """An operator that tracers record whole, since its loop reads the bounds."""
    name = "funcmodels::" + schema.partition("(")[0]
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    torch.library.define(name, schema[schema.index("(") :], tags=tags)
    torch.library.impl(name, "CompositeExplicitAutograd", fn)
    torch.library.register_fake(name, fake)
    return getattr(torch.ops.funcmodels, name.removeprefix("funcmodels::")).default


_linear_operator = _operator(
    "grouped_linear(Tensor rows, Tensor weight, Tensor bounds) -> Tensor",
    _linear,
    lambda rows, weight, bounds: rows.new_empty(rows.shape[0], weight.shape[1]),
)
_outer_operator = _operator(
    "grouped_outer(Tensor left, Tensor right, Tensor bounds, int matrices) -> Tensor",
    _outer,
    lambda left, right, bounds, n: left.new_empty(n, left.shape[1], right.shape[1]),
)


class _Linear(torch.autograd.Function):
    """Bilinear in rows and weight; bounds have no derivative."""

    @staticmethod
    def forward(rows, weight, bounds):
        return _linear_operator(rows, weight, bounds)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        rows, weight, bounds = ctx.saved_tensors
        by_rows = by_weight = None
        if ctx.needs_input_grad[0]:
            by_rows = grouped_linear(grad, weight.mT, bounds)
        if ctx.needs_input_grad[1]:
            by_weight = grouped_outer(grad, rows, bounds, weight.shape[0])
        return by_rows, by_weight, None

    @staticmethod
    def jvp(ctx, *tangents):
        *primals, bounds = ctx.saved_tensors
        with outer_tangents():
            (rows, weight), (rows_t, weight_t) = values(primals), values(tangents[:2])
            by_rows = None if rows_t is None else grouped_linear(rows_t, weight, bounds)
            by_weight = None if weight_t is None else grouped_linear(rows, weight_t, bounds)
            return _total(by_rows, by_weight)

    @staticmethod
    def vmap(info, in_dims, *args):
        rows, weight, bounds = args
        size, matrices = info.batch_size, weight.shape[0]
        rows = _batched(rows, in_dims[0], size)
        if in_dims[1] is not None:
            weight = weight.movedim(in_dims[1], 0)
            matrices = weight.shape[1]
            weight = weight.flatten(0, 1)
        bounds = _side_by_side(_batched(bounds, in_dims[2], size), rows.shape[1], matrices)
        out = grouped_linear(rows.flatten(0, 1), weight, bounds)
        return out.unflatten(0, (size, -1)), 0


class _Outer(torch.autograd.Function):
    """Bilinear in left and right; bounds have no derivative."""

    @staticmethod
    def forward(left, right, bounds, matrices):
        return _outer_operator(left, right, bounds, matrices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.matrices = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        left, right, bounds = ctx.saved_tensors
        by_left = by_right = None
        if ctx.needs_input_grad[0]:
            by_left = grouped_linear(right, grad, bounds)
        if ctx.needs_input_grad[1]:
            by_right = grouped_linear(left, grad.mT, bounds)
        return by_left, by_right, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        *primals, bounds = ctx.saved_tensors
        with outer_tangents():
            (left, right), (left_t, right_t) = values(primals), values(tangents[:2])
            n = ctx.matrices
            by_left = None if left_t is None else grouped_outer(left_t, right, bounds, n)
            by_right = None if right_t is None else grouped_outer(left, right_t, bounds, n)
            return _total(by_left, by_right)

    @staticmethod
    def vmap(info, in_dims, *args):
        left, right, bounds, matrices = args
        size = info.batch_size
        left, right = _batched(left, in_dims[0], size), _batched(right, in_dims[1], size)
        bounds = _side_by_side(_batched(bounds, in_dims[2], size), left.shape[1], matrices)
        out = grouped_outer(left.flatten(0, 1), right.flatten(0, 1), bounds, size * matrices)
        return out.unflatten(0, (size, matrices)), 0


def _batched(t: Tensor, dim: int | None, size: int) -> Tensor:
    """With the vmapped dim first, expanded where there was none."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _side_by_side(bounds: Tensor, rows: int, matrices: int) -> Tensor:
    """Bounds (samples, copies * matrices, 2) of rows put one sample after the other.

    The groups come as (copies, samples, matrices), so that g % matrices is still the matrix, and
    g % (samples * matrices) the matrix of the sample.
    """
    first = torch.arange(bounds.shape[0], device=bounds.device)[:, None, None] * rows
    return (bounds + first).unflatten(1, (-1, matrices)).transpose(0, 1).flatten(0, 2)


def _total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


for _function in (_Linear, _Outer):
    # `apply` asks for the signature of forward at every call.
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined]
    torch.compiler.allow_in_graph(_function)
