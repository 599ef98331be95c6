"""einops' einsum, with a product by a matrix as what `F.linear` multiplies by.

`torch.einsum` multiplies by `bmm`, with a batch of one. That gives the matrix's gradient
transposed, which every optimiser then copies, and in bfloat16 takes longer than `mm` does.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any, NamedTuple

import einops
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function


class Product(NamedTuple):
    """A product over the last dims of x and the last, or the first, of a matrix.

    Args:
        dims: how many are summed over.
        last: whether they are the matrix's last.
    """

    dims: int
    last: bool


def einsum(*operands: Any) -> Tensor:
    """`einops.einsum(*tensors, pattern)`, in every respect but speed.

    A product of two, whose second is a matrix (of any number of dims, no dim of which is a batch's)
    summed over its last dims or its first, in the order of the first's last ones, is `F.linear` or
    `matmul` of views of them. All else is einops' einsum, as is what a tracer sees.

    >>> einsum(torch.ones(2, 3), torch.ones(4, 5, 3), "... e, h d e -> ... h d").shape
    torch.Size([2, 4, 5])
    """
    if len(operands) == 3:
        x, w, pattern = operands
        if torch.compiler.is_compiling() or not has_torch_function((x, w)):
            found = product_of(pattern)
            if found is not None and fits(x, w, found):
                return product(x, w, found)
    return einops.einsum(*operands)


def einsum_of_letters(equation: str, *operands: Tensor) -> Tensor:
    """`torch.einsum`, as `einsum` is einops': for a function that was traced."""
    if len(operands) == 2:
        found = product_of_letters(equation)
        if found is not None and fits(*operands, found):
            return product(*operands, found)
    return torch.einsum(equation, *operands)


def product(x: Tensor, w: Tensor, how: Product) -> Tensor:
    """x (*rest, *summed) by w (*out, *summed) or (*summed, *out): (*rest, *out)."""
    size = math.prod(x.shape[x.ndim - how.dims :])
    x = x if how.dims == 1 else x.flatten(-how.dims)
    if how.last:
        out = w.shape[: w.ndim - how.dims]
        y = F.linear(x, w if w.ndim == 2 else w.reshape(-1, size))
    else:
        out = w.shape[how.dims :]
        y = torch.matmul(x, w if w.ndim == 2 else w.reshape(size, -1))
    return y if len(out) == 1 else y.unflatten(-1, out)


def fits(x: Tensor, w: Tensor, how: Product) -> bool:
    """Whether the summed dims are as long; einsum knows what to make of others, or what to say."""
    if x.ndim < how.dims or w.ndim <= how.dims or 0 in w.shape:
        return False
    of_w = w.shape[w.ndim - how.dims :] if how.last else w.shape[: how.dims]
    return x.shape[x.ndim - how.dims :] == of_w


@torch.compiler.assume_constant_result
def product_of(pattern: str) -> Product | None:
    """What einops' pattern says, if it is such a product."""
    return _product_of(pattern, r"\.\.\.|[^\s.]+")


@torch.compiler.assume_constant_result
def product_of_letters(equation: str) -> Product | None:
    """What torch's equation says, in which each letter is a dim."""
    return _product_of(equation, r"\.\.\.|[^\s.]")


@functools.lru_cache(maxsize=1024)
def _product_of(text: str, dim: str) -> Product | None:
    left, arrow, right = text.partition("->")
    inputs = [re.findall(dim, part) for part in left.split(",")]
    if not arrow or len(inputs) != 2:
        return None
    x, w = inputs
    return as_product(x, w, re.findall(dim, right))


def as_product(x: list[str], w: list[str], out: list[str]) -> Product | None:
    """The same of names of dims, of which "..." may be one of x's."""
    if not all(name == "..." or name.isidentifier() for name in (*x, *w, *out)):
        return None  # einops' to refuse
    if "..." in w or any(len(set(names)) < len(names) for names in (x, w, out)):
        return None
    summed = [name for name in x if name in w]
    n = len(summed)
    if not n or n == len(w) or x[-n:] != summed:
        return None
    for last, at, rest in ((True, w[-n:], w[:-n]), (False, w[:n], w[n:])):
        if at == summed and out == x[:-n] + rest:
            return Product(n, last)
    return None
