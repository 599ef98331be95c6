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
        steps: the first call of each kind.
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
    """One item, in which layers of one kind are one step."""
    kinds = {step.title: step for step in reversed(steps)}
    shown = tuple(kinds[kind] for kind in dict.fromkeys(step.title for step in steps))
    numbers = tuple(
        tuple(_number(step) for step in steps if step.title == one.title) for one in shown
    )
    return [Repeat(shown, numbers, tuple(step.name for step in steps))]


def _number(step: Step) -> int:
    return int(step.attr.rpartition(".")[2])


def numbers_text(numbers: Sequence[int]) -> str:
    """`0-125`, `0, 2, ... 24` or `3, 7, 8 and 5 more`."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1:
        first = f"{numbers[0]}" if steps == {1} else f"{numbers[0]}, {numbers[1]}"
        return f"{first}–{numbers[-1]}" if steps == {1} else f"{first}, … {numbers[-1]}"
    if len(numbers) > 4:
        return f"{', '.join(map(str, numbers[:3]))} and {len(numbers) - 3} more"
    return ", ".join(map(str, numbers))
