"""Products of an activation and a parameter -> linear layers on flat activations."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from compiler import collectives, layers
from compiler.ir import Block, LocalSize, Sym, TensorType, tensor_type
from compiler.layers import Matrix
from compiler.passes.parameter_view import ParameterView, uses_of, view_of
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
        product = product_of(node)
        if isinstance(product, Product) and _is_alone(block, node, product):
            _lower(block, node, product)
    return block


def _is_alone(block: Block, node: fx.Node, p: Product) -> bool:
    """Whether a product's parameters are its own: a layer's are read by that layer alone."""
    own = [p.w.param, *([] if p.bias is None else [p.bias])]
    return all(uses_of(block, param) == {node} for param in own)


def why_no_linear(node: fx.Node) -> str | None:
    """Why a product of an activation and a parameter is no linear layer; None where it may be."""
    found = product_of(node)
    return found if isinstance(found, str) else None


@dataclass
class Product:
    """x[*batch, *contracted] times w -> batch and out in some order, each a list of letters."""

    x: fx.Node
    w: ParameterView
    at: Any  # the placement of w as it is seen
    x_letters: list[str]
    w_letters: list[str]
    result: list[str]
    bias: fx.Node | None = None

    @property
    def batch(self) -> list[str]:
        return [c for c in self.x_letters if c not in self.w_letters]


def product_of(node: fx.Node) -> Product | str:
    """The node as a product that a linear layer can be, or why it is none."""
    found = _as_letters(node)
    if found is None:
        return "it is no product of one activation and one matrix"
    shared = set(found.x_letters) & set(found.w_letters)
    if not shared:
        return "an outer product: it sums over no dim"
    if not _as_long(found, shared):
        return "a dim of 1 of one factor stands for all of the other's"
    if shared & set(found.result):
        return "it applies another matrix to each element of a dim, as to each head"
    if sorted(found.result) != sorted(set(found.x_letters) ^ set(found.w_letters)):
        return "it sums over a dim of one factor alone"
    if not found.batch:
        return "it is applied to no tokens"
    if len(found.batch) > 1:  # adapters know which request each token is of, and no more rows
        return "it is applied to several rows of each token, as to each head"
    if _matrix(found) is None:
        return "its matrix is a part of a parameter, or not in the order of one"
    return found


def _as_long(p: Product, shared: set[str]) -> bool:
    """Whether the dims that both factors have are as long in one as in the other."""
    of_x = dict(zip(p.x_letters, tensor_type(p.x).shape, strict=True))
    of_w = {c: prod(f.size for f in dim) for c, dim in zip(p.w_letters, p.w.dims, strict=True)}
    return all(of_x[c] == of_w[c] for c in shared)


def _as_letters(node: fx.Node) -> Product | None:
    """The operands and their dims as letters."""
    args = list(node.args)
    if node.target is torch.einsum:
        equation, *operands = args
        if len(operands) != 2 or not all(isinstance(n, fx.Node) for n in operands):
            return None
        terms = letters_of(str(equation), [len(tensor_type(n).shape) for n in operands])  # type: ignore[arg-type]
        return None if terms is None else _of(*operands, *terms)  # type: ignore[arg-type]
    x, w = args[0], args[1]
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    ranks = len(tensor_type(x).shape), len(tensor_type(w).shape)
    if node.target is F.linear:
        lead = [f"b{i}" for i in range(ranks[0] - 1)]
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
        if ranks[1] != 2 or (bias is not None and not is_param(bias)):
            return None
        return _of(x, w, [*lead, "k"], ["n", "k"], [*lead, "n"], bias)  # type: ignore[arg-type]
    if min(ranks) < 2:
        return None
    if ranks[1] == 2:
        lead = [f"b{i}" for i in range(ranks[0] - 2)]
        return _of(x, w, [*lead, "m", "k"], ["k", "n"], [*lead, "m", "n"])
    lead = [f"b{i}" for i in range(ranks[1] - 2)]
    if ranks[0] == 2:
        return _of(x, w, ["n", "k"], [*lead, "k", "m"], [*lead, "n", "m"])
    # As `vmap` over the matrices of one parameter is written: x is the same for each of them.
    same = _expanded(x, ranks[1] - 2)
    if same is None or len(tensor_type(same).shape) != 2:
        return None
    return _of(same, w, ["m", "k"], [*lead, "k", "n"], [*lead, "m", "n"])


def _of(
    a: fx.Node,
    b: fx.Node,
    a_letters: list[str],
    b_letters: list[str],
    result: list[str],
    bias: fx.Node | None = None,
) -> Product | None:
    """A product of two operands, of which just one is a parameter, or a view of one."""
    views = view_of(a), view_of(b)
    if views[1] is not None and views[0] is None:
        at = b.meta.get("placement")
        return Product(a, views[1], at, a_letters, b_letters, result, bias)
    if views[0] is not None and views[1] is None:
        at = a.meta.get("placement")
        return Product(b, views[0], at, b_letters, a_letters, result, bias)
    return None


def _expanded(x: fx.Node, count: int) -> fx.Node | None:
    """What was repeated along `count` new dims in front."""
    while is_call(x, collectives.take_block) and x.args[1] < count:  # type: ignore[operator]
        x = x.args[0]  # type: ignore[assignment]
    if not is_call(x, Tensor.expand):
        return None
    (same,) = x.all_input_nodes
    return same if tensor_type(same).shape == tensor_type(x).shape[count:] else None


def _matrix(p: Product) -> tuple[Matrix, list[str], list[str]] | None:
    """The parameter as [out, in], with the letters of both: a cut one leads.

    A layer cuts a matrix into blocks of rows or of columns.
    """
    cut = p.w_letters[p.at.dim] if isinstance(p.at, Shard) else None
    out = sorted((c for c in p.result if c in p.w_letters), key=lambda c: c != cut)
    summed = sorted((c for c in p.x_letters if c in p.w_letters), key=lambda c: c != cut)
    rows, columns = (p.w.whole_dims(map(p.w_letters.index, side)) for side in (out, summed))
    if rows is None or columns is None:
        return None
    own = p.w.param.meta.get("placement")
    if cut is not None and not (isinstance(own, Shard) and own.dim in (*rows[:1], *columns[:1])):
        return None
    return Matrix(rows, columns), out, summed


def _lower(block: Block, node: fx.Node, p: Product) -> None:
    """Put the linear, and the reshapes around it, in the place of a product."""
    at, x_at, batch = p.at, p.x.meta["placement"], p.batch
    cut = p.w_letters[at.dim] if isinstance(at, Shard) else None
    if isinstance(x_at, Shard) and p.x_letters[x_at.dim] in batch:
        return  # another dim than the weight's is cut: no layer of the engine's is that
    found = _matrix(p)
    assert found is not None
    matrix, out, contracted = found
    sizes = _sizes(p)
    x = _flat(block, node, p, batch, contracted, sizes)
    kind = "replicated" if cut is None else "column" if cut in out else "row_partial"
    reduced = only_user(node)
    if kind == "row_partial" and is_call(reduced, collectives.all_reduce):
        assert reduced is not None
        kind, node = "row", _absorb(block, node, reduced)
    features = prod(sizes[c] for c in out)
    rows = sizes[batch[0]] if len(batch) == 1 else Sym("num_tokens")
    flat = tensor_type(p.x).dtype, (rows, features)
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
        (x, (p.w.param,), biases),
        {"kind": kind, "matrices": (matrix,)},
        type=TensorType(*flat),
        placement=placement,
        name=_name(node),
    )
    if len(out) != 1 or len(batch) > 1:
        new = _unflat(block, node, new, batch, out, sizes, at if kind == "column" else None, cut)
    if [*batch, *out] != p.result:
        order = [*batch, *out]
        new = insert(block, node, torch.permute, (new, tuple(map(order.index, p.result))))
    replace_with(block, node, new)


def _name(node: fx.Node) -> str:
    """The user's variable for a product's result, where there is one."""
    base = node.name.rstrip("0123456789").rstrip("_")
    return "out" if base in ("einsum", "matmul", "linear", "all_reduce") else base


def _sizes(p: Product) -> dict[str, Any]:
    """Global size of each letter."""
    return {
        **dict(zip(p.x_letters, tensor_type(p.x).shape, strict=True)),
        **{c: prod(f.size for f in dim) for c, dim in zip(p.w_letters, p.w.dims, strict=True)},
    }


def _flat(
    block: Block, node: fx.Node, p: Product, batch: list, contracted: list, sizes: dict
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
