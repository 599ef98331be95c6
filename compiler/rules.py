"""Sharding rules: for a torch function or an op, what its inputs must be and what its output is.

A rule sees the placements its operands have along one mesh axis and returns a `Decision`: the
placements they are to have (the partitioner inserts the collectives), the output's, and the
arguments of the local operation where they differ. It returns None where it knows no way, and the
operands are gathered, which is always right.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from compiler.ir import LocalSize, Sym, TensorType
from compiler.placement import PARTIAL, REPLICATE, Partial, Placement, Replicate, Shard
from funcmodels import ops


@dataclass(frozen=True)
class Exactly:
    """A demand on mesh sizes: `axis`, of `units` blocks, must be divided, not replicated."""

    units: int
    axis: str
    why: str


@dataclass
class Decision:
    """How a node runs on one rank.

    Args:
        inputs: the placement that each input node is to have.
        output: the node's placement, or a tuple of them for a tuple of tensors.
        args, kwargs, target: of the local operation, where they are not the node's own.
        needs: demands on mesh sizes.
        independent: whether each output depends on the operand in its place alone, so that a whole
            operand beside a cut one is not used differently on each rank.
    """

    inputs: dict[fx.Node, Placement]
    output: Placement | tuple[Placement, ...]
    args: tuple | None = None
    kwargs: dict | None = None
    target: Any = None
    needs: list[Exactly] = field(default_factory=list)
    independent: bool = False


# The pseudo axis along which a served batch is cut: each rank would hold some of the tokens.
TOKENS = "tokens"


@dataclass
class View:
    """What a rule sees: the node, its operands' placements along `axis`, and types."""

    node: fx.Node
    placements: dict[fx.Node, Placement]
    axis: str

    def arg(self, i: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.node.args[i] if len(self.node.args) > i else self.node.kwargs.get(name, default)

    def at(self, node: fx.Node) -> Placement:
        return self.placements[node]

    def whole(self, node: Any) -> Placement:
        """The placement of an operand that cannot use a pending sum: `Partial` is reduced first."""
        found = self.placements[node] if isinstance(node, fx.Node) else REPLICATE
        return REPLICATE if isinstance(found, Partial) else found

    def type(self, node: fx.Node) -> TensorType:
        return node.meta["type"]

    @property
    def tensors(self) -> list[fx.Node]:
        return list(self.node.all_input_nodes)


Rule = Callable[[View], Decision | None]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for torch functions or ops."""

    def register(fn: Rule) -> Rule:
        for target in targets:
            assert target not in RULES, f"two rules for {target}"
            RULES[target] = fn
        return fn

    return register


def dim_of(dim: int, rank: int) -> int:
    """A dim counted from the front."""
    return dim + rank if dim < 0 else dim


# Element by element, with broadcasting

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
)  # fmt: skip
_BINARY = (
    torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.maximum, torch.minimum,
    torch.floor_divide, torch.remainder, torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge,
    torch.logical_and, torch.logical_or, torch.logical_xor, torch.bitwise_and, torch.bitwise_or,
    torch.bitwise_xor, torch.bitwise_left_shift, torch.bitwise_right_shift, torch.where, torch.lerp,
    torch.masked_fill, torch.addcmul, torch.addcdiv, torch.rsub, torch.fmod, torch.atan2,
    ops.swiglu, ops.geglu,
)  # fmt: skip


@rule(*_UNARY, *_BINARY)
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


# Products


@rule(torch.einsum)
def einsum(view: View) -> Decision | None:
    """One letter is cut: it stays so in the output, or makes it a pending sum."""
    operands: Any
    equation, *operands = view.node.args
    if isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    terms = letters_of(str(equation), [len(view.type(n).shape) for n in operands])
    if terms is None:
        return None
    return _contract(view, operands, terms[:-1], terms[-1])


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


def _contract(
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
    return _contract(view, [x, y], [tx, ty], [*inner, *rest])


@rule(F.linear)
def linear(view: View) -> Decision | None:
    """x @ w.T + b; a bias on top of a pending sum would be added on every rank."""
    x, w = view.node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    bias = view.arg(2, "bias")
    lead = [f"b{i}" for i in range(len(view.type(x).shape) - 1)]
    found = _contract(view, [x, w], [[*lead, "k"], ["n", "k"]], [*lead, "n"])
    if not isinstance(bias, fx.Node):
        return found
    if isinstance(found.output, Partial):
        return None
    cut = isinstance(found.output, Shard) and found.output.dim == len(lead)
    found.inputs[bias] = (
        Shard(0, found.output.units, found.output.axis) if cut else REPLICATE  # type: ignore[union-attr]
    )
    return found


# Shapes


@rule(torch.reshape, torch.flatten, torch.unflatten)
def reshape(view: View) -> Decision | None:
    """Dims are merged and split in groups; a cut dim must lead its group."""
    x = view.tensors[0]
    before, after = view.type(x).shape, view.type(view.node).shape
    at = view.at(x)
    if not isinstance(at, Shard):
        return Decision({x: at}, at, args=(x, _kept(view, after)), kwargs={}, target=torch.reshape)
    for old, new in shape_groups(before, after):
        if at.dim not in old:
            continue
        if any(before[d] != 1 for d in old if d < at.dim):
            return None
        target = next((d for d in new if after[d] != 1), None)
        if target is None:
            return None
        size = after[target]
        if isinstance(size, Sym):
            units = at.units
            if len(old) > 1 or len(new) > 1:
                return None
        else:
            units = math.gcd(at.units, size)
        if units == 1:
            return None
        needs = [] if units == at.units else [Exactly(units, at.axis, f"it is split into {size}")]
        out = Shard(target, units, at.axis)
        return Decision({x: at}, out, (x, _kept(view, after, out)), {}, torch.reshape, needs)
    return None


def _kept(view: View, shape: tuple, shard: Shard | None = None) -> tuple:
    """The sizes of the local result: -1 where the node has one, a rank's share where it is cut."""
    given = view.arg(1, "shape") if view.node.target is torch.reshape else None
    sizes = list(given) if isinstance(given, (tuple, list)) else _one_inferred(shape)
    if shard is not None and sizes[shard.dim] != -1 and not isinstance(sizes[shard.dim], Sym):
        sizes[shard.dim] = LocalSize(
            shard.units, sizes[shard.dim] // shard.units, shard.axis, view.axis
        )
    return tuple(sizes)


def _one_inferred(shape: tuple) -> list:
    """A shape whose only symbolic size is left to torch."""
    if sum(isinstance(n, Sym) for n in shape) == 1:
        return [-1 if isinstance(n, Sym) else n for n in shape]
    return list(shape)


def shape_groups(before: tuple, after: tuple) -> list[tuple[list[int], list[int]]]:
    """Dims of two shapes of one size, in the smallest groups of equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [], []
        a: Any = 1
        b: Any = 1
        if i < len(before):
            a, old, i = before[i], [i], i + 1
        if j < len(after):
            b, new, j = after[j], [j], j + 1
        while a != b:
            if isinstance(a, Sym) or isinstance(b, Sym) or a == -1 or b == -1:
                old, new = [*old, *range(i, len(before))], [*new, *range(j, len(after))]
                i, j = len(before), len(after)
                break
            if a < b and i < len(before):
                a, old, i = _times(a, before[i]), [*old, i], i + 1
            elif b < a and j < len(after):
                b, new, j = _times(b, after[j]), [*new, j], j + 1
            else:
                break
        groups.append((old, new))
    return groups


def _times(a: Any, b: Any) -> Any:
    """A product that stays symbolic, and so unequal, where a factor is."""
    return Sym(f"({a})*({b})") if isinstance(a, Sym) or isinstance(b, Sym) else a * b


def _moved(view: View, order: list[int]) -> Decision:
    """A permutation of dims: output dim i is input dim order[i]."""
    x = view.tensors[0]
    at = view.at(x)
    out = Shard(order.index(at.dim), at.units, at.axis) if isinstance(at, Shard) else at
    return Decision({x: at}, out)


@rule(torch.transpose)
def transpose(view: View) -> Decision | None:
    rank = len(view.type(view.node).shape)
    a, b = dim_of(view.arg(1, "dim0"), rank), dim_of(view.arg(2, "dim1"), rank)
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return _moved(view, order)


@rule(torch.permute)
def permute(view: View) -> Decision | None:
    rank = len(view.type(view.node).shape)
    return _moved(view, [dim_of(d, rank) for d in view.arg(1, "dims")])


@rule(torch.movedim)
def movedim(view: View) -> Decision | None:
    rank = len(view.type(view.node).shape)
    source, to = view.arg(1, "source"), view.arg(2, "destination")
    pairs = zip(*(([d] if isinstance(d, int) else list(d)) for d in (source, to)), strict=True)
    moved = sorted((dim_of(t, rank), dim_of(s, rank)) for s, t in pairs)
    order = [d for d in range(rank) if d not in {s for _, s in moved}]
    for to_dim, from_dim in moved:
        order.insert(to_dim, from_dim)
    return _moved(view, order)


@rule(torch.unsqueeze)
def unsqueeze(view: View) -> Decision | None:
    dim = dim_of(view.arg(1, "dim"), len(view.type(view.node).shape))
    x = view.tensors[0]
    at = view.at(x)
    out = Shard(at.dim + (dim <= at.dim), at.units, at.axis) if isinstance(at, Shard) else at
    return Decision({x: at}, out)


@rule(torch.squeeze)
def squeeze(view: View) -> Decision | None:
    x = view.tensors[0]
    at, shape = view.at(x), view.type(x).shape
    dim = view.arg(1, "dim")
    gone = [d for d, n in enumerate(shape) if n == 1 and dim in (None, d, d - len(shape))]
    if isinstance(at, Shard) and at.dim not in gone:
        at = Shard(at.dim - sum(d < at.dim for d in gone), at.units, at.axis)
        # Without a dim, a local block of size 1 would be squeezed away with the others.
        if dim is None:
            return None
    return Decision({x: view.at(x)}, at)


@rule(Tensor.expand)
def expand(view: View) -> Decision | None:
    x = view.tensors[0]
    at, sizes = view.at(x), list(view.arg(1, "size"))
    if not isinstance(at, Shard):
        return Decision({x: at}, _by_tokens(view) or at)
    dim = at.dim + len(sizes) - len(view.type(x).shape)
    if sizes[dim] == view.type(x).shape[at.dim]:
        sizes[dim] = -1
    return Decision({x: at}, Shard(dim, at.units, at.axis), args=(x, tuple(sizes)))


# Taking apart and putting together


@rule(operator.getitem)
def getitem(view: View) -> Decision | None:
    """An element of a tuple, or basic indexing of a tensor that leaves the cut dim whole."""
    x, index = view.node.args
    assert isinstance(x, fx.Node)
    if not isinstance(x.meta["type"], TensorType):
        at = view.placements[x][index]  # type: ignore[index]
        return Decision({}, at)
    parts = index if isinstance(index, tuple) else (index,)
    at, rank = view.at(x), len(view.type(x).shape)
    if not isinstance(at, Shard):
        if any(isinstance(p, (fx.Node, list)) for p in parts):
            return None
        return Decision({x: at}, at)
    if any(not (isinstance(p, (int, slice)) or p is None or p is Ellipsis) for p in parts):
        return None
    used = sum(p is not None and p is not Ellipsis for p in parts)
    dim = out = 0
    if Ellipsis not in parts:
        parts = (*parts, Ellipsis)
    for part in parts:
        if part is None:
            out += 1
        elif part is Ellipsis:
            if dim <= at.dim < dim + rank - used:
                return Decision({x: at}, Shard(out + at.dim - dim, at.units, at.axis))
            dim, out = dim + rank - used, out + rank - used
        else:
            if dim == at.dim:
                if part != slice(None):
                    return None
                return Decision({x: at}, Shard(out, at.units, at.axis))
            dim, out = dim + 1, out + isinstance(part, slice)
    return None


@rule(torch.split, torch.chunk)
def split(view: View) -> Decision | None:
    """Along another dim than the cut one."""
    x = view.tensors[0]
    at, rank = view.at(x), len(view.type(x).shape)
    if isinstance(at, Shard) and at.dim == dim_of(view.arg(2, "dim", 0), rank):
        return None
    return Decision({x: at}, (at,) * len(view.node.meta["type"]))


@rule(torch.unbind)
def unbind(view: View) -> Decision | None:
    x = view.tensors[0]
    at, rank = view.at(x), len(view.type(x).shape)
    dim = dim_of(view.arg(1, "dim", 0), rank)
    if isinstance(at, Shard):
        if at.dim == dim:
            return None
        out: Placement = Shard(at.dim - (dim < at.dim), at.units, at.axis)
        return Decision({x: at}, (out,) * len(view.node.meta["type"]))
    return Decision({x: at}, (at,) * len(view.node.meta["type"]))


@rule(torch.cat, torch.stack)
def cat(view: View) -> Decision | None:
    """Along another dim than the cut one, when all can be cut alike."""
    parts = list(view.node.args[0])  # type: ignore[arg-type]
    rank = len(view.type(view.node).shape)
    dim = dim_of(view.arg(1, "dim", 0), rank)
    stacked = view.node.target is torch.stack
    first = next((view.at(n) for n in parts if isinstance(view.at(n), Shard)), None)
    if not isinstance(first, Shard):
        return Decision(dict.fromkeys(parts, REPLICATE), REPLICATE)
    if not stacked and first.dim == dim:
        return None
    if any(isinstance(at := view.at(n), Shard) and at != first for n in parts):
        return None
    out = first.dim + (stacked and dim <= first.dim)
    return Decision(dict.fromkeys(parts, first), Shard(out, first.units, first.axis))


# Reductions and what works along a dim


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
_DIM_AT = {torch.norm: 2, torch.linalg.vector_norm: 2, torch.topk: 2, torch.roll: 2}


@rule(torch.mean, torch.amax, torch.amin, torch.logsumexp, torch.var, torch.std, torch.prod,
      torch.max, torch.min, torch.argmax, torch.argmin, torch.any, torch.all, torch.norm,
      torch.linalg.vector_norm)  # fmt: skip
def reduction(view: View) -> Decision | None:
    """Along other dims than the cut one."""
    if len(view.tensors) > 1:  # torch.max(x, y) is torch.maximum
        return elementwise(view)
    return _reduced(view, view.tensors[0])


def _reduced(view: View, x: fx.Node) -> Decision | None:
    """A reduction that leaves the cut dim, or None where it goes over it."""
    at, rank = view.whole(x), len(view.type(x).shape)
    count = len(types) if isinstance(types := view.node.meta["type"], tuple) else None
    if not isinstance(at, Shard):
        return Decision({x: at}, at if count is None else (at,) * count)
    dims = view.arg(_DIM_AT.get(view.node.target, 1), "dim")
    if dims is None:
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
)  # fmt: skip


@rule(*_ALONG_DIM)
def along_dim(view: View) -> Decision | None:
    """The dims that are left whole keep their places; the cut one must be among them."""
    x, *rest = view.tensors
    at, rank = view.whole(x), len(view.type(x).shape)
    last = -1 if view.node.target in (torch.sort, torch.argsort, torch.topk) else None
    i = 2 if view.node.target is torch.take_along_dim else _DIM_AT.get(view.node.target, 1)
    dims = view.arg(i, "dim", view.node.kwargs.get("dims", last))
    dims = [dims] if isinstance(dims, int) else dims
    if isinstance(at, Shard):
        if dims is None or at.dim in {dim_of(d, rank) for d in dims}:
            return None
        if any(view.type(n).shape[at.dim] != view.type(x).shape[at.dim] for n in rest):
            return None  # an index may take fewer
    types = view.node.meta["type"]
    out = (at,) * len(types) if isinstance(types, tuple) else at
    return Decision({x: at, **dict.fromkeys(rest, at)}, out)


@rule(F.rms_norm, F.layer_norm)
def functional_norm(view: View) -> Decision | None:
    """Over the last dims, which must be whole."""
    x, *rest = view.tensors
    at, rank = view.whole(x), len(view.type(x).shape)
    if isinstance(at, Shard) and at.dim >= rank - len(view.arg(1, "normalized_shape")):
        return None
    return Decision({x: at, **dict.fromkeys(rest, REPLICATE)}, at)


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
    return Decision({x: view.at(x)}, view.at(x))


@rule(Tensor.repeat)
def repeat(view: View) -> Decision | None:
    """Along other dims than the cut one."""
    (x,) = view.tensors
    at, times = view.at(x), view.arg(1, "repeats")
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


@rule(torch.zeros, torch.ones, torch.full, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full)
def constant(view: View) -> Decision | None:
    """The same on every rank; of its tensor only the dtype matters."""
    return Decision({n: view.at(n) for n in view.tensors}, _by_tokens(view) or REPLICATE)


def _by_tokens(view: View) -> Placement | None:
    """Of a value that is the same for every token: cut like tokens, when those are."""
    shape = view.type(view.node).shape
    if view.axis != TOKENS or shape[:1] != (Sym("num_tokens"),):
        return None
    return Shard(0, 2, TOKENS)


# The ops of funcmodels


@rule(ops.rms_norm, ops.layer_norm)
def norm(view: View) -> Decision | None:
    """Over the last dim, which must be whole."""
    x, *rest = view.tensors
    at = view.whole(x)
    if isinstance(at, Shard) and at.dim == len(view.type(x).shape) - 1:
        return None
    return Decision({x: at, **dict.fromkeys(rest, REPLICATE)}, at)


@rule(ops.rope)
def rope(view: View) -> Decision | None:
    """Each head by itself; positions are whole, or cut by tokens as q and k are."""
    q, k = view.node.args[:2]
    positions = view.arg(2, "positions")
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(positions, fx.Node)
    last = len(view.type(q).shape) - 1
    at_q, at_k = view.whole(q), view.whole(k)
    if any(isinstance(at, Shard) and at.dim == last for at in (at_q, at_k)):
        return None
    by_tokens = isinstance(at_q, Shard) and at_q.dim < last - 1
    inputs = {q: at_q, k: at_k, positions: at_q if by_tokens else REPLICATE}
    return Decision(inputs, (at_q, at_k), independent=True)


@rule(ops.attention)
def attention(view: View) -> Decision | None:
    """By heads: query heads are divided, KV heads divided, or replicated where there are fewer."""
    q, k, v = view.node.args[:3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    heads_dim = len(view.type(q).shape) - 2
    heads, kv_heads = view.type(q).shape[-2], view.type(k).shape[-2]
    rest = [n for n in view.tensors if n not in (q, k, v)]
    found = [view.at(n) for n in (q, k, v) if isinstance(view.at(n), Shard)]
    if not found:
        return Decision(dict.fromkeys(view.tensors, REPLICATE), REPLICATE)
    if view.axis == TOKENS:  # the one operation that may look at other tokens: the engine serves it
        by_token = dict.fromkeys((q, k, v), found[0])
        return Decision({**by_token, **dict.fromkeys(rest, REPLICATE)}, found[0])
    if any(at.dim != heads_dim for at in found):  # type: ignore[union-attr]
        return None
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    at_q, at_k = view.at(q), view.at(k)
    axis_q = at_q.axis if isinstance(at_q, Shard) else "heads"
    axis_k = at_k.axis if isinstance(at_k, Shard) else axis_q
    out = Shard(heads_dim, heads, axis_q)
    kv = Shard(heads_dim, kv_heads, axis_k)
    inputs: dict[fx.Node, Placement] = {q: out, k: kv, v: kv, **dict.fromkeys(rest, REPLICATE)}
    kwargs: dict[str, Any] = dict(view.node.kwargs)
    sinks, slopes = kwargs.get("sinks"), kwargs.get("alibi_slopes")
    for per_head in (sinks, slopes):
        if isinstance(per_head, fx.Node):
            inputs[per_head] = Shard(0, heads, axis_q)
    if isinstance(slopes, (tuple, list)):
        kwargs["alibi_slopes"] = LocalValues(tuple(slopes), view.axis)
    return Decision(
        inputs, out, kwargs=kwargs, needs=[Exactly(heads, axis_q, "query heads are divided")]
    )


@dataclass(frozen=True)
class LocalValues:
    """A tuple of numbers, one a unit, of which each rank takes its own block."""

    values: tuple[float, ...]
    axis: str

    def at(self, rank: int, parts: int) -> tuple[float, ...]:
        n = len(self.values) // parts
        return self.values[rank * n : (rank + 1) * n]


def vocab_embed(tokens: Tensor, table: Tensor, vocab: int, axis: str) -> Tensor:
    """Rows of a vocabulary that is cut by rows: zeros for tokens of other ranks."""
    raise AssertionError("vocab_embed has no meaning outside compiler.evaluate")


@rule(ops.embed)
def embed(view: View) -> Decision | None:
    """A vocabulary cut by rows gives a pending sum; one cut by columns, columns."""
    tokens, table = view.node.args
    assert isinstance(tokens, fx.Node) and isinstance(table, fx.Node)
    at, at_tokens = view.at(table), view.at(tokens)
    if isinstance(at_tokens, Shard):
        return Decision({tokens: at_tokens, table: REPLICATE}, at_tokens)
    if not isinstance(at, Shard):
        return Decision({tokens: REPLICATE, table: REPLICATE}, REPLICATE)
    rank = len(view.type(view.node).shape)
    if at.dim == 1:
        return Decision({tokens: REPLICATE, table: at}, Shard(rank - 1, at.units, at.axis))
    vocab = view.type(table).shape[0]
    needs = [Exactly(at.units, at.axis, "the vocabulary is divided")]
    args = (tokens, table, vocab, view.axis)
    return Decision({tokens: REPLICATE, table: at}, PARTIAL, args, {}, vocab_embed, needs)


@rule(ops.unembed)
def unembed(view: View) -> Decision | None:
    """As a linear without bias."""
    x, table = view.node.args
    assert isinstance(x, fx.Node) and isinstance(table, fx.Node)
    lead = [f"b{i}" for i in range(len(view.type(x).shape) - 1)]
    return _contract(view, [x, table], [[*lead, "e"], ["v", "e"]], [*lead, "v"])


def decide(view: View) -> tuple[Decision, bool]:
    """The rule's decision, and whether operands had to be gathered for want of one."""
    found = RULES.get(view.node.target)
    decision = found(view) if found else None
    if decision is not None:
        return decision, False
    types = view.node.meta["type"]
    whole = (REPLICATE,) * len(types) if isinstance(types, tuple) else REPLICATE
    gathered = any(isinstance(view.placements.get(n), Shard) for n in view.tensors)
    return Decision(dict.fromkeys(view.tensors, REPLICATE), whole), gathered


def is_cut(placement: Any) -> bool:
    """Whether ranks hold different values."""
    return any(
        not isinstance(p, Replicate)
        for p in (placement if isinstance(placement, tuple) else (placement,))
    )
