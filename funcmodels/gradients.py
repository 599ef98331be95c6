"""Gradients of a loss by a pytree: as torch.func's, for less memory; and over microbatches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from funcmodels import tree
from funcmodels.errors import ShapeError
from funcmodels.loss import ENTRIES, entries
from funcmodels.ops.embed_rows import rows_aside


def grad_and_value(
    fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """`torch.func.grad_and_value`, without what it keeps for derivatives beyond the first.

    torch.func's records the backward pass as well, in case it is differentiated in turn, and holds
    every value of it until it returns. Here, where no transform is around the call and no argument
    requires a gradient, torch.autograd takes the gradient, and each value is freed once used. In
    any other case, and in what torch.compile compiles, this is torch.func's function.

    Args:
        fn: returns a scalar, or, with has_aux, a scalar and a pytree.
        argnums: by which arguments, each a pytree of floating tensors.
        has_aux: whether fn returns something beside its value.
    Returns:
        A function of fn's arguments: (grads, value), or (grads, (value, aux)). Gradients by what
        the value does not depend on are zeros.
    """
    by_func = torch.func.grad_and_value(fn, argnums, has_aux)
    places = argnums if isinstance(argnums, tuple) else (argnums,)

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _is_differentiated((args, kwargs)):
            return by_func(*args, **kwargs)
        given = list(args)
        for i in places:
            given[i] = tree.map(lambda t: t.detach().requires_grad_(), args[i])
        leaves = [leaf for i in places for leaf in tree.leaves(given[i])]
        with torch.enable_grad(), rows_aside(leaves) as rows:
            out = fn(*given, **kwargs)
            value, aux = out if has_aux else (out, None)
            _check_scalar(value)
            rest = iter(rows.added(torch.autograd.grad(value, leaves, allow_unused=True)))
        grads = tuple(tree.map(lambda _: next(rest), args[i]) for i in places)
        value = value.detach()
        if has_aux:
            value = value, tree.map(lambda t: t.detach() if isinstance(t, Tensor) else t, aux)
        return grads if isinstance(argnums, tuple) else grads[0], value

    return call


def accumulate(
    fn: Callable[[Any, Any], Tensor],
    microbatches: int,
    *,
    count: Callable[[Any], Tensor | float] | None = None,
) -> Callable[[Any, Any], tuple[Any, Tensor]]:
    """The gradient of a mean over a batch, from one part of the batch after another.

    loss = sum_i count_i fn(weights, part_i) / sum_i count_i, and its gradient alike: what `fn` of
    the whole batch gives, where fn is a mean of as many things as it counts. Only one part's values
    exist at a time.

    Args:
        fn: (weights, batch) -> a scalar, a mean over the batch, such as `fm.loss`'s.
        microbatches: into how many parts each tensor of the batch is cut, along its first dim.
        count: of a part, how many things its mean is of; `count_of` unless given.
    Returns:
        A function of weights and batch, as of `fm.grad_and_value(fn)`: (grads, loss). Sums are in
        float32 or better, and the gradients in the dtypes of the weights.
    Raises:
        ShapeError: microbatches does not divide the rows of the batch.
    """
    step = grad_and_value(fn)

    def call(weights: Any, batch: Any) -> tuple[Any, Tensor]:
        parts = _parts(batch, microbatches)
        counts = [torch.as_tensor((count or count_of)(part)) for part in parts]
        whole = torch.stack([c.to(torch.float64) for c in counts]).sum()
        whole = torch.where(whole == 0, 1, whole)
        grads, loss = None, None
        for part, number in zip(parts, counts, strict=True):
            found, value = step(weights, part)
            share = number / whole
            found = tree.map(lambda g, share=share: _wide(g) * share.to(_wide(g).dtype), found)
            grads = found if grads is None else tree.map(torch.add, grads, found)
            value = _wide(value) * share.to(_wide(value).dtype)
            loss = value if loss is None else loss + value
        assert loss is not None
        return tree.map(lambda g, w: g.to(w.dtype), grads, weights), loss

    return call


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _parts(batch: Any, n: int) -> list[Any]:
    """The batch in n parts of as many rows."""
    rows = {leaf.shape[0] for leaf in tree.leaves(batch)}
    for size in rows:
        if n < 1 or size % n:
            raise ShapeError(
                "accumulate: the microbatches do not divide the batch",
                got=f"{size} rows, microbatches={n}",
                need="parts of equal size",
                fix=f"microbatches in {{{', '.join(str(d) for d in _divisors(size))}}}",
            )
    return [tree.map(lambda t, i=i: t.tensor_split(n)[i], batch) for i in range(n)]


def _divisors(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


def count_of(batch: Any) -> Tensor:
    """Of how many things a loss is taken to be the mean, () on the device of the batch.

    Of a batch as of `fm.pack`, the tokens that have a loss; of another with a "loss_mask", what
    that leaves; of any other, its rows.
    """
    if isinstance(batch, Mapping):
        if "tokens" in batch and not set(batch) - set(ENTRIES):
            return entries(batch)["loss_mask"].sum()
        if "loss_mask" in batch:
            return batch["loss_mask"].sum()
    first = tree.leaves(batch)[0]
    return torch.tensor(float(first.shape[0]), device=first.device)


def _is_differentiated(args: Any) -> bool:
    """Whether something around the call may differentiate it, or vectorise it."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    tensors = (leaf for leaf in tree.leaves(args) if isinstance(leaf, Tensor))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _check_scalar(value: Any) -> None:
    if not isinstance(value, Tensor) or value.dim():
        got = (
            f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise ShapeError(
            "grad_and_value: a gradient is of one number",
            got=got,
            need="a scalar tensor",
            fix="loss.mean(), or has_aux=True where the function returns more than its loss",
        )
