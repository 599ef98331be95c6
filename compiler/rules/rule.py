"""What a sharding rule sees, what it returns, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from compiler.ir import Sym, TensorType
from compiler.placement import REPLICATE, Partial, Placement, Shard
from compiler.rules.local import widened


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


class Steps:
    """What a rule spells an operation with: nodes in the global view, partitioned one by one."""

    axis: str

    def __call__(
        self,
        name: str,
        target: Any,
        *args: Any,
        over: int | None = None,
        like: fx.Node | None = None,
        dtype: torch.dtype | None = None,
        shape: tuple | None = None,
    ) -> fx.Node:
        """A node of a name; its type is its first operand's, or that of `like`.

        Args:
            over: a dim that becomes 1.
            dtype, shape: of the type, where they are others.
        """
        raise NotImplementedError

    def wide(self, x: fx.Node) -> fx.Node:
        """x in float32 at least."""
        kind = x.meta["type"].dtype
        found = torch.promote_types(kind, torch.float32)
        return x if found == kind else self("wide", widened, x, dtype=found)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """x in a dtype."""
        if x.meta["type"].dtype == dtype:
            return x
        return self("cast", Tensor.to, x, dtype, dtype=dtype)


@dataclass
class Spelled:
    """An operation as other ones, each of which has a rule; None where it cannot be spelled so."""

    write: Callable[[Steps], fx.Node | None]


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


Rule = Callable[[View], Decision | Spelled | None]
R = TypeVar("R", bound=Rule)
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[R], R]:
    """Register a rule for torch functions or ops."""

    def register(fn: R) -> R:
        for target in targets:
            assert target not in RULES, f"two rules for {target}"
            RULES[target] = fn
        return fn

    return register


def dim_of(dim: int, rank: int) -> int:
    """A dim counted from the front."""
    return dim + rank if dim < 0 else dim


def by_tokens(view: View) -> Placement | None:
    """Of a value that is the same for every token: cut like tokens, when those are."""
    shape = view.type(view.node).shape
    if view.axis != TOKENS or shape[:1] != (Sym("num_tokens"),):
        return None
    return Shard(0, 2, TOKENS)
