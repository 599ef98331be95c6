"""The decision for a node: by its rule, or, without one, gathered."""

from __future__ import annotations

from typing import Any

from compiler.placement import REPLICATE, Replicate, Shard
from compiler.rules.rule import RULES, Decision, View


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
