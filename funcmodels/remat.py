"""Functions whose inner values are computed again for the backward pass, instead of being kept.

As `torch.utils.checkpoint`, but for pure functions, so that it composes with every transform of
`torch.func`: what a function saves is its arguments; its gradient is such a function again, of the
arguments and cotangents, and so on to any order.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from funcmodels.errors import TraceError
from funcmodels.ops.deferred import deferring
from funcmodels.ops.forward_mode import outer_tangents, values
from funcmodels.ops.function_rules import is_last_derivative, no_view

Flat = Callable[..., tuple[Tensor, ...]]  # of tensors alone


def remat(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of which a derivative keeps the arguments only, and computes the rest again.

    Under `torch.compile` it is `torch.utils.checkpoint`. There, where the gradient is taken by
    `torch.func` inside of what is compiled, nothing is computed again: compile the loss, and take
    `fm.grad_and_value` of that.

    Args:
        fn: pure, of pytrees of tensors and static values; returns a pytree of tensors. It is run
            again in each backward pass: what it draws or reads must be the same then.
    Raises:
        TraceError: it uses a tensor of the function around it, by which no gradient would be taken.
    """
    _check_closure(fn)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return fn(*args, **kwargs)
        if torch.compiler.is_compiling():  # which has a rule of its own for what to keep
            with deferring(False):
                if torch._C._are_functorch_transforms_active():
                    return fn(*args, **kwargs)
                return checkpoint(fn, *args, use_reentrant=False, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        static = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        found: list[Any] = []  # what the results are beside their tensors

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = list(static)
            for i, tensor in zip(places, tensors, strict=True):
                given[i] = tensor
            args, kwargs = pytree.tree_unflatten(given, spec)
            with deferring(False):
                out, out_spec = pytree.tree_flatten(fn(*args, **kwargs))
            found[:] = [out_spec, [None if isinstance(x, Tensor) else x for x in out]]
            found.append([i for i, x in enumerate(out) if isinstance(x, Tensor)])
            return tuple(x for x in out if isinstance(x, Tensor))

        results = Remat.apply(flat, *tensors)
        out_spec, out, where = found
        for i, result in zip(where, results, strict=True):
            out[i] = result
        return pytree.tree_unflatten(out, out_spec)

    return call


class Remat(torch.autograd.Function):
    """fn(*tensors), which returns a tuple of tensors."""

    @staticmethod
    def forward(*args):
        fn, *tensors = args
        return tuple(no_view(t) for t in fn(*tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.fn = inputs[0]
        ctx.mark_non_differentiable(*[t for t in output if not t.is_floating_point()])
        ctx.floats = [t.is_floating_point() for t in output]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx, *grads):
        needs = tuple(ctx.needs_input_grad[1:])
        grads = [g for g, is_float in zip(grads, ctx.floats, strict=True) if is_float]
        gradient = functools.partial(_gradient, ctx.fn, needs, tuple(ctx.floats))
        if is_last_derivative():
            found = _plain_gradient(ctx.fn, needs, ctx.floats, ctx.saved_tensors, grads)
        else:
            found = Remat.apply(gradient, *ctx.saved_tensors, *grads)
        found = iter(found)
        return None, *(next(found) if need else None for need in needs)

    @staticmethod
    def jvp(ctx, *tangents):
        with outer_tangents():
            primals, tangents = values(ctx.saved_tensors), values(tangents[1:])
            moving = tuple(t is not None for t in tangents)
            some = functools.partial(_of_some, ctx.fn, primals, moving, ctx.floats)
            # A tangent is laid out as its primal, which fails where that is an expanded one.
            given = [x.contiguous() for x, moves in zip(primals, moving, strict=True) if moves]
            along = [t for t in tangents if t is not None]
            out = iter(torch.func.jvp(some, tuple(given), tuple(along))[1])
        return tuple(next(out) if is_float else None for is_float in ctx.floats)

    @staticmethod
    def vmap(info, in_dims, *args):
        fn, *tensors = args
        many = torch.func.vmap(fn, in_dims[1:], randomness=info.randomness)
        out = Remat.apply(many, *tensors)
        return out, (0,) * len(out)


def _gradient(fn: Flat, needs: tuple[bool, ...], floats: tuple[bool, ...], *given: Tensor) -> Any:
    """The gradients of <grads, fn(tensors)> by those that need one; given are tensors and grads."""
    tensors, grads = given[: len(needs)], given[len(needs) :]
    some = functools.partial(_of_some, fn, tensors, needs, floats)
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    pull = torch.func.vjp(some, *wanted)[1]
    return pull(tuple(grads))


def _of_some(fn: Flat, tensors: Any, which: Any, floats: Any, *some: Tensor) -> tuple[Tensor, ...]:
    """fn's floating results, with some of its tensors put in place."""
    rest = iter(some)
    out = fn(*(next(rest) if is_ else t for t, is_ in zip(tensors, which, strict=True)))
    return tuple(t for t, is_float in zip(out, floats, strict=True) if is_float)


def _plain_gradient(fn: Flat, needs: Any, floats: Any, tensors: Any, grads: Any) -> Any:
    """As `_gradient`, where no transform is at work: without the wrappers of torch.func."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    with torch.enable_grad():
        out = _of_some(fn, leaves, [False] * len(leaves), floats)
    pairs = [(o, g) for o, g in zip(out, grads, strict=True) if o.requires_grad]
    wanted = [t for t in leaves if t.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in wanted]
    out, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(out, wanted, grads, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def _check_closure(fn: Callable[..., Any]) -> None:
    """A tensor that the function closes over would get no gradient, without an error."""
    try:
        found = inspect.getclosurevars(fn).nonlocals
    except TypeError:  # no Python function, as a functools.partial
        return
    for name, value in found.items():
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            raise TraceError(
                f"{getattr(fn, '__name__', 'the function')} uses a tensor from around it",
                got=f"{name}, which is no argument",
                need="every tensor as an argument, since gradients are taken by arguments alone",
                fix=f"pass {name} to it",
            )


__all__ = ["remat"]
