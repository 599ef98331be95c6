"""New and repeated elements: padding, repetition, masks, constants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compiler.placement import REPLICATE, Shard
from compiler.rules.rule import Decision, View, by_tokens, rule


@rule(F.one_hot)
def one_hot(view: View) -> Decision | None:
    """A further dim at the end; without `num_classes`, its size would depend on the values."""
    (x,) = view.tensors
    return Decision({x: view.whole(x)}, view.whole(x))


@rule(F.pad)
def pad(view: View) -> Decision | None:
    """Of other dims than the cut one; zeros are added to each term of a pending sum's."""
    (x,) = view.tensors
    at, rank = view.whole(x), len(view.type(x).shape)
    sizes = view.arg(1, "pad")
    if isinstance(at, Shard) and any(sizes[2 * (rank - 1 - at.dim) :][:2]):
        return None
    return Decision({x: at}, at)


@rule(torch.repeat_interleave)
def repeat_interleave(view: View) -> Decision | None:
    """Each block's elements repeated: KV heads for the query heads that share them."""
    x, repeats = view.tensors[0], view.arg(1, "repeats")
    if not isinstance(repeats, int) or view.arg(2, "dim") is None:
        return None
    kwargs = {k: v for k, v in view.node.kwargs.items() if k != "output_size"}  # that of the whole
    return Decision({x: view.whole(x)}, view.whole(x), kwargs=kwargs)


@rule(Tensor.repeat)
def repeat(view: View) -> Decision | None:
    """Along other dims than the cut one."""
    (x,) = view.tensors
    at, times = view.whole(x), view.arg(1, "repeats")
    if not isinstance(at, Shard):
        return Decision({x: at}, at)
    dim = at.dim + len(times) - len(view.type(x).shape)
    return Decision({x: at}, Shard(dim, at.units, at.axis)) if times[dim] == 1 else None


@rule(torch.tril, torch.triu)
def triangle(view: View) -> Decision | None:
    """Of the last two dims, which must be whole."""
    (x,) = view.tensors
    at = view.at(x)
    if isinstance(at, Shard) and at.dim >= len(view.type(x).shape) - 2:
        return None
    return Decision({x: at}, at)


@rule(torch.zeros, torch.ones, torch.full, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full,
      Tensor.new_tensor)  # fmt: skip
def constant(view: View) -> Decision | None:
    """The same on every rank; of its tensor only the dtype matters."""
    return Decision({n: view.at(n) for n in view.tensors}, by_tokens(view) or REPLICATE)
