"""Products of an activation and a parameter -> linear layers on flat activations."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from compiler import collectives, layers
from compiler.ir import Block, LocalSize, Sym, TensorType, tensor_type
from compiler.layers import Matrix
from compiler.placement import REPLICATE, Partial, Shard
from compiler.rewrite import calls_of, insert, is_call, is_param, only_user, replace_with
from compiler.rules import letters_of


def lower_linear(block: Block) -> Block:
    """Write einsum, matmul and F.linear with a parameter as `layers.linear`.

        q = einsum("...a,bca->...bc", h, p.q)               # p.q: heads head_dim hidden, heads cut
    ->
        y = linear(h, [p.q], kind="column"); q = reshape(y, (-1, heads/tp, 64))

        y = einsum("...ab,cab->...c", o, p.o); z = all_reduce(y)
    ->
        z = linear(reshape(o, (-1, heads/tp*64)), [p.o], kind="row")
    """
    for node in calls_of(block, torch.einsum, torch.matmul, F.linear):
        product = _product(node)
        if isinstance(product, _Product):
            _lower(block, node, product)
    return block


def why_no_linear(node: fx.Node) -> str | None:
    """Why a product of an activation and a parameter is no linear layer; None where it may be."""
    found = _product(node)
    return found if isinstance(found, str) else None


@dataclass
class _Product:
    """x[*batch, *contracted] times w -> [*batch, *out], each a list of letters."""

    x: fx.Node
    w: fx.Node
    x_letters: list[str]
    w_letters: list[str]
    result: list[str]
    bias: fx.Node | None = None


def _product(node: fx.Node) -> _Product | str:
    """The node as a product that a linear layer can be, or why it is none."""
    found = _as_letters(node)
    if found is None:
        return "it is no product of one activation and one matrix"
    shared = set(found.x_letters) & set(found.w_letters)
    if not shared:
        return "an outer product: it sums over no dim"
    if shared & set(found.result):
        return "it applies another matrix to each element of a dim, as to each head"
    if sorted(found.result) != sorted(set(found.x_letters) ^ set(found.w_letters)):
        return "it sums over a dim of one factor alone"
    batch = [c for c in found.x_letters if c not in shared]
    if not batch or found.result[: len(batch)] != batch:
        return "the dims of the tokens do not lead in its result"
    return found


def _as_letters(node: fx.Node) -> _Product | None:
    """The operands and their dims as letters."""
    args = list(node.args)
    if node.target is torch.einsum:
        equation, *operands = args
        if len(operands) != 2 or not all(isinstance(n, fx.Node) for n in operands):
            return None
        terms = letters_of(str(equation), [len(tensor_type(n).shape) for n in operands])  # type: ignore[arg-type]
        if terms is None:
            return None
        pairs = list(zip(operands, terms[:2], strict=True))
        weights = [pair for pair in pairs if is_param(pair[0])]
        if len(weights) != 1:
            return None
        (w, w_letters), (x, x_letters) = weights[0], next(p for p in pairs if p is not weights[0])
        return _Product(x, w, x_letters, w_letters, terms[2])  # type: ignore[arg-type]
    x, w = args[0], args[1]
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    lead = [f"b{i}" for i in range(len(tensor_type(x).shape) - 1)]
    stored = ["n", "k"] if node.target is F.linear else ["k", "n"]
    if is_call(w, torch.transpose) and is_param(w.args[0]):
        w, stored = w.args[0], stored[::-1]
    if not is_param(w) or is_param(x) or len(tensor_type(w).shape) != 2:  # type: ignore[arg-type]
        return None
    bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
    if bias is not None and not is_param(bias):
        return None
    return _Product(x, w, [*lead, "k"], stored, [*lead, "n"], bias)  # type: ignore[arg-type]


def _lower(block: Block, node: fx.Node, p: _Product) -> None:
    """Put the linear, and the reshapes around it, in the place of a product."""
    at = p.w.meta["placement"]
    cut = p.w_letters[at.dim] if isinstance(at, Shard) else None
    x_at = p.x.meta["placement"]
    batch = [c for c in p.x_letters if c not in p.w_letters]
    contracted = [c for c in p.x_letters if c in p.w_letters]
    out = [c for c in p.w_letters if c not in p.x_letters]
    if isinstance(x_at, Shard) and p.x_letters[x_at.dim] in batch:
        return  # another dim than the weight's is cut: no layer of the engine's is that
    # A layer cuts a matrix into blocks of rows or of columns, so the cut dim must lead.
    contracted.sort(key=lambda c: c != cut)
    in_order = [c for c in p.result if c in out]
    out = sorted(in_order, key=lambda c: c != cut)
    sizes = _sizes(p)
    x = _flat(block, node, p, batch, contracted, sizes)
    matrix = Matrix(tuple(map(p.w_letters.index, out)), tuple(map(p.w_letters.index, contracted)))
    kind = "replicated" if cut is None else "column" if cut in out else "row_partial"
    reduced = only_user(node)
    if kind == "row_partial" and is_call(reduced, collectives.all_reduce):
        assert reduced is not None
        kind, node = "row", _absorb(block, node, reduced)
    features = prod(sizes[c] for c in out)
    tokens = tensor_type(node).shape[: len(batch)]
    flat = tensor_type(p.x).dtype, (tokens[0] if len(batch) == 1 else Sym("num_tokens"), features)
    placement: Any = REPLICATE
    if kind == "column":
        assert isinstance(at, Shard)
        placement = Shard(1, at.units, at.axis)
    elif kind == "row_partial":
        placement = Partial()
    biases = (p.bias,) if p.bias is not None else ()
    new: fx.Node = insert(
        block,
        node,
        layers.linear,
        (x, (p.w,), biases),
        {"kind": kind, "matrices": (matrix,)},
        type=TensorType(*flat),
        placement=placement,
        name=_name(node),
    )
    if len(out) > 1 or len(batch) > 1:
        new = _unflat(block, node, new, batch, out, sizes, at if kind == "column" else None, cut)
    if out != in_order:
        order = [*range(len(batch)), *(len(batch) + out.index(c) for c in in_order)]
        new = insert(block, node, torch.permute, (new, tuple(order)))
    replace_with(block, node, new)


def _name(node: fx.Node) -> str:
    """The user's variable for a product's result, where there is one."""
    base = node.name.rstrip("0123456789").rstrip("_")
    return "out" if base in ("einsum", "matmul", "linear", "all_reduce") else base


def _sizes(p: _Product) -> dict[str, Any]:
    """Global size of each letter."""
    return {
        **dict(zip(p.x_letters, tensor_type(p.x).shape, strict=True)),
        **dict(zip(p.w_letters, tensor_type(p.w).shape, strict=True)),
    }


def _flat(
    block: Block, node: fx.Node, p: _Product, batch: list, contracted: list, sizes: dict
) -> fx.Node:
    """x as (num_tokens, features), its contracted dims in the weight's order."""
    x, at = p.x, p.x.meta["placement"]
    order = [p.x_letters.index(c) for c in (*batch, *contracted)]
    if order != sorted(order):
        shape = tuple(sizes[c] for c in (*batch, *contracted))
        if isinstance(at, Shard):
            at = Shard(order.index(at.dim), at.units, at.axis)
        kind = TensorType(tensor_type(x).dtype, shape)
        x = insert(block, node, torch.permute, (x, tuple(order)), type=kind, placement=at, like=x)
    if len(contracted) == 1 and len(batch) == 1:
        return x
    features = prod(sizes[c] for c in contracted)
    local: Any = features
    if isinstance(at, Shard):
        local = LocalSize(at.units, features // at.units, at.axis, "tp")
        at = Shard(1, at.units, at.axis)
    kind = TensorType(tensor_type(x).dtype, (sizes[batch[0]], features))
    return insert(block, node, torch.reshape, (x, (-1, local)), type=kind, placement=at, like=x)


def _unflat(
    block: Block, node: fx.Node, y: fx.Node, batch: list, out: list, sizes: dict, at: Any, cut: Any
) -> fx.Node:
    """(num_tokens, features) as (*batch, *out)."""
    shape = [sizes[c] for c in (*batch, *out)]
    local: list[Any] = [-1 if isinstance(n, Sym) else n for n in shape]
    placement = y.meta["placement"]
    if isinstance(at, Shard):
        i = len(batch) + out.index(cut)
        local[i] = LocalSize(at.units, shape[i] // at.units, at.axis, "tp")
        placement = Shard(i, at.units, at.axis)
    kind = TensorType(tensor_type(y).dtype, tuple(shape))
    return insert(
        block, node, torch.reshape, (y, tuple(local)), type=kind, placement=placement, like=y
    )


def _absorb(block: Block, node: fx.Node, reduced: fx.Node) -> fx.Node:
    """Take the sum over ranks into the layer: what it was is now the product's place."""
    reduced.replace_input_with(node, reduced.args[0])  # type: ignore[arg-type]
    return reduced
