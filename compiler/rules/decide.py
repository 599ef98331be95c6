"""The decision for a node: by its rule, or, without one, gathered."""

from __future__ import annotations

from typing import Any

from compiler.placement import REPLICATE, Replicate, Shard
from compiler.rules.rule import RULES, Decision, Spelled, View


def decide(view: View) -> tuple[Decision | Spelled, bool]:
    """The rule's decision, and whether operands had to be gathered for want of one."""
    found = RULES.get(view.node.target)
    decision = found(view) if found else None
    if decision is not None:
        return decision, False
    return gathered(view)


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
