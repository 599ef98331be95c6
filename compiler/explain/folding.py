"""The layers of a body, as few distinct ones as there are: what a reader wants to see of 126."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from compiler.explain.records import BlockView, Step


@dataclass(frozen=True)
class Repeat:
    """Steps that call blocks, over and over.

    Args:
        steps: one call of each kind, in order.
        numbers: for each of them, the layers that are calls of the same block.
        names: of all the calls.
    """

    steps: tuple[Step, ...]
    numbers: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]


def folded_steps(block: BlockView) -> list[Step | Repeat]:
    """The steps of a block, with runs of layers as one item each."""
    out: list[Step | Repeat] = []
    run: list[Step] = []
    for step in block.steps:
        if is_layer(step):
            run.append(step)
            continue
        if run and step.kind != "view":
            out += _runs(run)
            run = []
        out.append(step)
    return out + _runs(run) if run else out


def is_layer(step: Step) -> bool:
    """Whether a step calls an element of a list of modules."""
    return step.kind == "block" and step.attr.rpartition(".")[2].isdigit()


def _runs(steps: list[Step]) -> list[Step | Repeat]:
    """One item for layers that alternate regularly; else one for each kind, with its numbers."""
    kinds = [step.title for step in steps]
    period = _period(kinds)
    starts = range(period) if period else [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    shown = tuple(steps[i] for i in starts)
    numbers = tuple(
        tuple(
            _number(step)
            for i, step in enumerate(steps)
            if step.title == one.title and (not period or i % period == at)
        )
        for at, one in enumerate(shown)
    )
    return [Repeat(shown, numbers, tuple(step.name for step in steps))]


def _number(step: Step) -> int:
    return int(step.attr.rpartition(".")[2])


def _period(kinds: Sequence[str]) -> int:
    """The length of the shortest stretch that a sequence repeats, at most 8; 0 for none."""
    for n in range(1, min(8, len(kinds)) + 1):
        if all(kind == kinds[i % n] for i, kind in enumerate(kinds)):
            return n
    return 0


def numbers_text(numbers: Sequence[int]) -> str:
    """`0-125`, `0, 2, ... 24` or `3, 7, 8 and 5 more`."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1:
        first = f"{numbers[0]}" if steps == {1} else f"{numbers[0]}, {numbers[1]}"
        return f"{first}–{numbers[-1]}" if steps == {1} else f"{first}, … {numbers[-1]}"
    if len(numbers) > 4:
        return f"{', '.join(map(str, numbers[:3]))} and {len(numbers) - 3} more"
    return ", ".join(map(str, numbers))
