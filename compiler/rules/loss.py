"""Cross-entropy over a vocabulary that is cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from compiler.placement import REPLICATE, Shard
from compiler.rules.rule import TOKENS, Decision, Exactly, View, rule
from funcmodels import ops


def cross_entropy_over_ranks(
    hidden: Tensor, table: Tensor, targets: Tensor, axis: str, **settings: Any
) -> Tensor:
    """`ops.cross_entropy` of each token, each rank with its rows of the table.

    The ranks exchange three numbers a token: of their logits the log-sum, the target's and the
    mean.
    """
    raise AssertionError("cross_entropy_over_ranks is carried out by compiler.loss_over_ranks")


@rule(ops.cross_entropy)
def cross_entropy(view: View) -> Decision | None:
    """Each token's loss, with a table whose rows are cut."""
    hidden, table, targets = view.node.args[:3]
    assert isinstance(hidden, fx.Node) and isinstance(table, fx.Node)
    at = view.at(table)
    if view.axis == TOKENS or view.node.kwargs.get("reduction", "mean") != "none":
        return None
    if not isinstance(at, Shard) or at.dim != 0 or at.units != view.type(table).shape[0]:
        return None
    settings = {k: v for k, v in view.node.kwargs.items() if k != "reduction"}
    needs = [Exactly(at.units, at.axis, "the vocabulary is divided")]
    args = (hidden, table, targets, view.axis)
    inputs = {**dict.fromkeys(view.tensors, REPLICATE), table: at}
    return Decision(inputs, REPLICATE, args, settings, cross_entropy_over_ranks, needs)
