"""What a model's axes ask of the number of ranks along a mesh axis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compiler import layers
from compiler.placement import Shard
from funcmodels.source import SourceLine

if TYPE_CHECKING:
    from compiler.partition import Partitioned

# Layers that pad the axis they cut, so that any number of ranks divides it.
_PADDED = (layers.vocab_embedding, layers.logits)


@dataclass(frozen=True)
class Need:
    """A demand on the number of ranks: it divides `units`, or, unless exact, is a multiple.

    Args:
        of: what has the axis, where that is no parameter.
    """

    axis: str
    units: int
    exact: bool
    why: str
    where: SourceLine
    of: str = ""

    def allows(self, parts: int) -> bool:
        return self.units % parts == 0 or (not self.exact and parts % self.units == 0)


class Exact:
    """The sizes that the ranks always divide, none of their blocks lying on several.

    An axis name may have several sizes in one model, and only some of them be exact.
    """

    def __init__(self, needs: Iterable[Need]) -> None:
        self._divided: dict[str, int] = {}
        for need in needs:
            if need.exact:
                self._divided[need.axis] = math.gcd(self._divided.get(need.axis, 0), need.units)

    def divides(self, axis: str, units: int) -> bool:
        """Whether every allowed number of ranks divides `units` of an axis."""
        return axis in self._divided and units % self._divided[axis] == 0


def strongest(needs: Iterable[Need]) -> list[Need]:
    """Demands without those that others imply, exact ones first."""
    needs = list(needs)
    exact = Exact(needs)
    needs = [n for n in needs if n.exact or not exact.divides(n.axis, n.units)]
    return sorted(needs, key=lambda need: not need.exact)


def served_needs(program: Partitioned) -> list[Need]:
    """The demands on tp of a served model.

    Those of its vocabulary go, since vLLM pads it; where a block would lie on several ranks, of all
    linear layers only that of queries, keys and values can hold it.
    """
    padded: dict[str, bool] = {}
    whole: list[Need] = []
    for block in program.all():
        for node in block.graph.nodes:
            at = node.meta.get("placement")
            if node.op != "get_attr" or not isinstance(at, Shard):
                continue
            pads = all(user.target in _PADDED for user in node.users)
            padded[at.axis] = padded.get(at.axis, True) and pads
            linears = [user for user in node.users if user.target is layers.linear]
            if any(user.kwargs["kind"] != "qkv" for user in linears):
                why = f"{node.target} is cut, and not replicated"
                whole.append(Need(at.axis, at.units, True, why, node.meta["where"]))
    return [need for need in (*program.needs, *whole) if not padded.get(need.axis, False)]
