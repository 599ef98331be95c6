"""What ranks send each other, how much, and why."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from compiler import collectives, layers
from compiler.check import padded
from compiler.explain.records import Collective
from compiler.explain.sizes import Sizes, per_token
from compiler.ir import target_name
from compiler.placement import Shard
from compiler.rules import max_over_ranks, rms_norm_over_ranks
from compiler.why import fix_of_parts
from funcmodels.source import SourceLine


class Sent:
    """The collectives of a lowered program.

    Args:
        gathered: the lines of operations without a sharding rule.
    """

    def __init__(self, sizes: Sizes, gathered: Collection[SourceLine]) -> None:
        self.sizes = sizes
        self.setting = sizes.setting
        self.gathered = gathered

    def of(self, node: fx.Node, *, in_head: bool) -> Collective | None:
        """What ranks send each other for a node, or None."""
        if node.op != "call_function":
            return None
        if node.target is layers.experts and self.setting.ep > self.setting.tp:
            return self._exchange(node)
        if self.setting.tp == 1:
            return None
        kind, why = self._asks_for(node)
        if not kind:
            return None
        size = self.sizes.bytes(node)
        if node.target is rms_norm_over_ranks:
            features: Any = node.meta["type"].shape[-1]
            size = per_token(node.meta["type"].shape) // features * torch.float32.itemsize
        if node.target is max_over_ranks:
            size *= self.setting.tp
        if node.target is layers.logits:
            vocab = node.meta["type"].shape[-1]
            size = size // vocab * padded(vocab)
        share = (self.setting.tp - 1) / self.setting.tp
        wire = round(size * share * (2 if kind == "all_reduce" else 1))
        return Collective(kind, size, in_head, wire, why)

    def _exchange(self, node: fx.Node) -> Collective:
        """Tokens go to the ranks of their experts, those of other groups too, and back."""
        k = node.args[2].meta["type"].shape[-1]  # type: ignore[union-attr]
        size, ep = 2 * k * self.sizes.bytes(node), self.setting.ep
        why = "each token goes to the ranks that have its experts, and back"
        return Collective("all_to_all", size, False, round(size * (ep - 1) / ep), why)

    def _asks_for(self, node: fx.Node) -> tuple[str, str]:
        if node.target is layers.linear and node.kwargs["kind"] == "row":
            at = node.args[0].meta["placement"]  # type: ignore[union-attr]
            over = f' over "{at.axis}"' if isinstance(at, Shard) else ""
            return "all_reduce", f"each rank has a part of the sum{over}"
        if node.target is layers.experts and node.kwargs["kind"] == "row":
            part = "some of the experts" if self.setting.ep > 1 else "a part of every expert"
            return "all_reduce", f"each rank has {part}"
        if node.target is layers.vocab_embedding:
            return "all_reduce", "each rank has the rows of a part of the vocabulary"
        if node.target is layers.logits:
            return "all_gather", "each rank has the logits of a part of the vocabulary"
        if node.target is rms_norm_over_ranks:
            return "all_reduce", "each rank has a part of the squares that a norm sums"
        if node.target is max_over_ranks:
            return "all_gather", "each rank has the largest of its own part"
        if node.target is collectives.all_reduce:
            return "all_reduce", "each rank has a part of a sum that all need"
        if node.target is collectives.all_gather:
            user = next(iter(node.users))
            name = target_name(user.target) if user.op != "output" else "what comes after"
            if node.meta["where"] in self.gathered:
                axis = node.args[0].meta["placement"].axis  # type: ignore[union-attr]
                fix = "" if (found := fix_of_parts(user, axis)) is None else f": {found}"
                return "all_gather", f"{name} has no sharding rule for a cut dim{fix}"
            return "all_gather", f"{name} needs all of it"
        return "", ""
