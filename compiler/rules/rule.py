"""What a sharding rule sees, what it returns, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from compiler.ir import Sym, TensorType
from compiler.placement import REPLICATE, Partial, Placement, Shard


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


def by_tokens(view: View) -> Placement | None:
    """Of a value that is the same for every token: cut like tokens, when those are."""
    shape = view.type(view.node).shape
    if view.axis != TOKENS or shape[:1] != (Sym("num_tokens"),):
        return None
    return Shard(0, 2, TOKENS)
