"""einsum, matmul and linear: products over letters, of which at most one is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from compiler.placement import PARTIAL, REPLICATE, Partial, Placement, Shard
from compiler.rules.rule import TOKENS, Decision, Exactly, Spelled, Steps, View, rule


@rule(torch.einsum)
def einsum(view: View) -> Decision | None:
    """One letter is cut: it stays so in the output, or makes it a pending sum."""
    operands: Any
    equation, *operands = view.node.args
    if isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    shapes = [view.type(n).shape for n in operands]
    terms = letters_of(str(equation), list(map(len, shapes)))
    if terms is None:
        return None
    *given, result = terms
    wide = {a for a, n in _sizes(given, shapes) if n != 1}
    # A dim of 1 beside another's n is no dim of the product.
    own = [
        [f"1{a}" if n == 1 and a in wide else a for a, n in zip(letters, shape, strict=True)]
        for letters, shape in zip(given, shapes, strict=True)
    ]
    return contract(view, operands, own, result)


def _sizes(terms: list[list[str]], shapes: list[tuple]) -> Iterator[tuple[str, Any]]:
    for letters, shape in zip(terms, shapes, strict=True):
        yield from zip(letters, shape, strict=True)


def letters_of(equation: str, ranks: list[int]) -> list[list[str]] | None:
    """The letters of each operand and of the output; dims under "..." get names of their own."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow:
        return None
    terms = left.split(",")
    most = max(
        (n - len(t.replace("...", "")) for t, n in zip(terms, ranks, strict=True)), default=0
    )

    def expand(term: str, count: int) -> list[str]:
        before, dots, after = term.partition("...")
        names = [f"...{i}" for i in range(most - count, most)] if dots else []
        return [*before, *names, *after]

    out = [expand(t, n - len(t.replace("...", ""))) for t, n in zip(terms, ranks, strict=True)]
    if any(len(set(letters)) < len(letters) for letters in out):
        return None  # a diagonal
    return [*out, expand(right, most)]


def contract(
    view: View, operands: list[fx.Node], terms: list[list[str]], result: list[str]
) -> Decision:
    """A product of operands over letters, of which at most one is cut."""
    chosen: tuple[str, Shard] | None = None
    # Parameters were declared; activations follow from them. So a parameter's sharding wins.
    for node, letters in sorted(
        zip(operands, terms, strict=True), key=lambda item: item[0].op != "get_attr"
    ):
        at = view.at(node)
        if isinstance(at, Shard) and chosen is None:
            chosen = (letters[at.dim], at)
    if chosen is None:
        return Decision(dict.fromkeys(operands, REPLICATE), REPLICATE)
    letter, shard = chosen
    inputs: dict[fx.Node, Placement] = {}
    for node, letters in zip(operands, terms, strict=True):
        if letter not in letters:
            inputs[node] = REPLICATE
            continue
        inputs[node] = Shard(letters.index(letter), shard.units, shard.axis)
    if letter not in result and shard.units == 1:  # every rank has the one block
        return Decision(dict.fromkeys(operands, REPLICATE), REPLICATE)
    if letter in result:
        return Decision(inputs, Shard(result.index(letter), shard.units, shard.axis))
    # Summed over a dim of which a block may lie on several ranks, it would be counted twice.
    needs = [Exactly(shard.units, shard.axis, "it is summed over")]
    return Decision(inputs, PARTIAL, needs=needs)


@rule(torch.matmul)
def matmul(view: View) -> Decision | None:
    """x @ y as a product over letters."""
    x, y = view.node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(y, fx.Node)
    rx, ry = len(view.type(x).shape), len(view.type(y).shape)
    batch = [f"b{i}" for i in range(max(rx, ry, 2) - 2)]

    def term(node: fx.Node, own: list[str]) -> list[str]:
        sizes = view.type(node).shape[: -len(own)]
        lead = batch[len(batch) - len(sizes) :]
        # A batch dim of 1 beside another's n is no dim of the product.
        return [*(f"1{b}" if n == 1 else b for b, n in zip(lead, sizes, strict=True)), *own]

    tx = term(x, ["m", "k"] if rx > 1 else ["k"])
    ty = term(y, ["k", "n"] if ry > 1 else ["k"])
    rest = [*(["m"] if rx > 1 else []), *(["n"] if ry > 1 else [])]
    inner = [b if b in tx or b in ty else f"1{b}" for b in batch]
    return contract(view, [x, y], [tx, ty], [*inner, *rest])


@rule(F.linear)
def linear(view: View) -> Decision | Spelled | None:
    """x @ w.T + b; of a pending sum, the bias is added once, to what the ranks have summed."""
    x, w = view.node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    bias = view.arg(2, "bias")
    lead = [f"b{i}" for i in range(len(view.type(x).shape) - 1)]
    rows = ["n"] if len(view.type(w).shape) > 1 else []  # a vector makes one number a token
    if not rows and bias is not None:
        return None
    found = contract(view, [x, w], [[*lead, "k"], [*rows, "k"]], [*lead, *rows])
    if not isinstance(bias, fx.Node):
        return found
    if isinstance(found.output, Partial):
        return None if view.axis == TOKENS else added_to(view, F.linear, (x, w), bias)
    cut = isinstance(found.output, Shard) and found.output.dim == len(lead)
    found.inputs[bias] = (
        Shard(0, found.output.units, found.output.axis) if cut else REPLICATE  # type: ignore[union-attr]
    )
    return found


def added_to(view: View, target: Any, args: tuple, bias: fx.Node) -> Spelled:
    """A product without its bias, and then the bias."""

    def write(steps: Steps) -> fx.Node:
        product = steps("product", target, *args, like=view.node)
        return steps("biased", torch.add, product, bias, like=view.node)

    return Spelled(write)


@rule(torch.addmm, torch.baddbmm)
def addmm(view: View) -> Spelled:
    """beta * b + alpha * (x @ y), in steps."""
    b, x, y = view.node.args[:3]
    assert isinstance(b, fx.Node) and isinstance(x, fx.Node) and isinstance(y, fx.Node)
    beta, alpha = view.arg(3, "beta", 1), view.arg(4, "alpha", 1)

    def write(steps: Steps) -> fx.Node:
        product = steps("product", torch.matmul, x, y, like=view.node)
        if alpha != 1:
            product = steps("product", torch.mul, product, alpha)
        if beta == 0:  # torch then ignores b, and what in it is no number
            return product
        added = b if beta == 1 else steps("added", torch.mul, b, beta)
        return steps("biased", torch.add, product, added, like=view.node)

    return Spelled(write)


@rule(torch.cdist)
def cdist(view: View) -> Decision | None:
    """Distances between rows of x and rows of y, which must have all of their features."""
    x, y = view.node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(y, fx.Node)
    batch = view.type(x).shape[:-2]
    if view.type(y).shape[:-2] != batch:
        return None
    lead = [f"b{i}" for i in range(len(batch))]
    found = contract(view, [x, y], [[*lead, "p", "k"], [*lead, "r", "k"]], [*lead, "p", "r"])
    return None if isinstance(found.output, Partial) else found


@rule(torch.linalg.solve_triangular, torch.linalg.solve)
def solve(view: View) -> Decision | None:
    """A system of each batch by itself: cut where both sides are, or where the matrix is."""
    A, B = view.node.args[:2]
    assert isinstance(A, fx.Node) and isinstance(B, fx.Node)
    rank = len(view.type(B).shape)
    at = next((p for p in (view.whole(B), view.whole(A)) if isinstance(p, Shard)), REPLICATE)
    if len(view.type(A).shape) != rank or (isinstance(at, Shard) and at.dim >= rank - 2):
        return None
    return Decision({A: at, B: at}, at)
