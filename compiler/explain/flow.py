"""What of a block is drawn, in its order, and the arrows between: down, or past what is between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compiler.explain.folding import Repeat, folded_steps
from compiler.explain.records import BlockView, Step

# Inputs that come from afar in every layer; an arrow for them would say nothing.
_KNOWN = ("positions", "segment_ids", "residual")


@dataclass(frozen=True)
class Skip:
    """An arrow past boxes: from after one to before another; -1 and their number are the ends."""

    start: int
    end: int
    lane: int


@dataclass(frozen=True)
class Flow:
    """The boxes of a block, and its arrows.

    Args:
        items: steps and repeated layers, without views.
        down: the places of boxes that an arrow leads to from the one before.
        skips: the other arrows.
    """

    items: tuple[Step | Repeat, ...]
    down: tuple[int, ...]
    skips: tuple[Skip, ...]

    @property
    def lanes(self) -> int:
        return max((skip.lane + 1 for skip in self.skips), default=0)


def flow(block: BlockView, most: int) -> Flow:
    """The boxes and arrows of a block; no more lanes than `most`, the shortest arrows first."""
    made: dict[
        str, tuple[str, ...]
    ] = {}  # a view, or a later layer of a loop -> what it stands for

    def seen(names: Sequence[str]) -> tuple[str, ...]:
        out: dict[str, None] = {}
        for name in names:
            out.update(dict.fromkeys(seen(made[name]) if name in made else (name,)))
        return tuple(out)

    items: list[Step | Repeat] = []
    reads: list[tuple[str, ...]] = []
    places: dict[str, int] = {}
    for item in folded_steps(block):
        if isinstance(item, Step) and item.kind == "view":
            made[item.name] = item.inputs
            continue
        first = item.steps[0] if isinstance(item, Repeat) else item
        if isinstance(item, Repeat):
            made |= {name: (first.name,) for name in item.names if name != first.name}
        places[first.name] = len(items)
        items.append(item)
        reads.append(seen(first.inputs))
    down, skips = [], []
    for i, sources in enumerate(reads):
        for source in sources:
            before = places.get(source, -1)
            if before < 0 and (source not in block.inputs or source in _KNOWN):
                continue
            if before == i - 1:
                down.append(i)
            else:
                skips.append((before, i))
    for result in seen(block.results):
        if places.get(result, len(items)) < len(items) - 1:
            skips.append((places[result], len(items)))
    return Flow(tuple(items), tuple(dict.fromkeys(down)), _in_lanes(skips, most))


def _in_lanes(skips: list[tuple[int, int]], most: int) -> tuple[Skip, ...]:
    """Each arrow as near to the boxes as those already there leave room for."""
    taken: list[list[tuple[int, int]]] = []
    out = []
    for start, end in sorted(set(skips), key=lambda s: (s[1] - s[0], s)):
        free = (i for i, used in enumerate(taken) if all(end <= a or b <= start for a, b in used))
        lane = next(free, len(taken))
        if lane >= most:
            continue
        if lane == len(taken):
            taken.append([])
        taken[lane].append((start, end))
        out.append(Skip(start, end, lane))
    return tuple(out)
