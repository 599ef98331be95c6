"""The decision for a node: by its rule, or, without one, gathered."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.node import map_arg

from compiler.placement import REPLICATE, Replicate, Shard
from compiler.rules.elementwise import is_elementwise
from compiler.rules.rule import RULES, Decision, Spelled, View


def decide(view: View) -> tuple[Decision | Spelled, bool]:
    """The rule's decision, and whether operands had to be gathered for want of one."""
    found = RULES.get(view.node.target)
    decision = found(view) if found else None
    if decision is not None:
        return decision, False
    return gathered(view)


def told_apart(view: View) -> tuple[View, dict[fx.Node, fx.Node]]:
    """A call as its rule is to see it, and the value that each stand-in among its operands is for.

    A rule says of each operand where it is to be. Of `einsum("a, b -> a b", x, x)` that is cut in
    one place, whole in the other: a value given twice is two operands. Elementwise, all lie alike.
    """
    node, given = view.node, []
    map_arg((node.args, node.kwargs), given.append)
    if len(set(given)) == len(given) or is_elementwise(node.target):
        return view, {}
    graph, met, stands_for = fx.Graph(), set(), {}

    def operand(old: fx.Node) -> fx.Node:
        if old not in met:
            met.add(old)
            return old
        new = graph.create_node(old.op, old.target, name=old.name)
        new.meta = old.meta
        stands_for[new] = old
        return new

    args, kwargs = map_arg(node.args, operand), map_arg(node.kwargs, operand)
    call = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
    call.meta = node.meta
    placements = {**view.placements, **{n: view.placements[old] for n, old in stands_for.items()}}
    return View(call, placements, view.axis), stands_for


def gathered(view: View) -> tuple[Decision, bool]:
    """Every operand whole, and whether one was cut."""
    types = view.node.meta["type"]
    whole = (REPLICATE,) * len(types) if isinstance(types, tuple) else REPLICATE
    found = any(isinstance(view.placements.get(n), Shard) for n in view.tensors)
    return Decision(dict.fromkeys(view.tensors, REPLICATE), whole), found


def is_cut(placement: Any) -> bool:
    """Whether ranks hold different values."""
    return any(
        not isinstance(p, Replicate)
        for p in (placement if isinstance(placement, tuple) else (placement,))
    )
