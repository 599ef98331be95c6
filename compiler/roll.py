"""The calls of a list's blocks one after another -> a loop, for emission."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from compiler.ir import Block
from compiler.modules import Placed
from compiler.rewrite import is_call


@dataclass
class Loop:
    """`for layer in container: carried = layer(...)`.

    Args:
        container: attribute path of the module list.
        calls: the calls, in order; they name the class of each layer.
        patterns: block -> for each argument, the carried value it is, or the node it is every time.
        initial: what the carried values are before the first call, None where the block takes that.
        results: the nodes that are the carried values after the last call.
    """

    container: str
    calls: list[fx.Node]
    patterns: dict[str, list[int | fx.Node]]
    initial: list[fx.Node | None]
    results: list[fx.Node]

    @property
    def constants(self) -> list[fx.Node]:
        """What layers are given every time."""
        given = [a for pattern in self.patterns.values() for a in pattern]
        return list(dict.fromkeys(a for a in given if isinstance(a, fx.Node)))


def roll(block: Block, placed: Placed) -> list[fx.Node | Loop]:
    """The block's nodes in order, with runs of layer calls as loops where they are regular."""
    nodes = [n for n in block.graph.nodes if n.op != "output"]
    loops: dict[fx.Node, Loop] = {}
    inside: set[fx.Node] = set()
    for container, calls in _runs(block, placed).items():
        loop = _loop(container, calls)
        if loop is not None and _together(nodes, loop):
            loops[calls[0]] = loop
            inside |= {*calls, *(p for c in calls for p in _parts(c))}
    out: list[fx.Node | Loop] = []
    for node in nodes:
        if node in loops:
            out.append(loops[node])
        elif node not in inside:
            out.append(node)
    return out


def _runs(block: Block, placed: Placed) -> dict[str, list[fx.Node]]:
    """The calls of each module list, where they take its elements in order."""
    found: dict[str, list[fx.Node]] = {}
    for call in block.calls:
        container, _, index = placed.calls[call].rpartition(".")
        if container and index.isdigit():
            run = found.setdefault(container, [])
            if int(index) == len(run):
                run.append(call)
    count = {c: sum(a.rpartition(".")[0] == c for a in placed.calls.values()) for c in found}
    return {c: run for c, run in found.items() if len(run) == count[c] > 1}


def _parts(call: fx.Node) -> list[fx.Node]:
    """The nodes that take a call's results apart, by index; none where it has one result."""
    return sorted(
        (u for u in call.users if is_call(u, operator.getitem)),
        key=lambda n: n.args[1],  # type: ignore[arg-type,return-value]
    )


def _values(call: fx.Node) -> list[fx.Node]:
    return _parts(call) or [call]


def _loop(container: str, calls: list[fx.Node]) -> Loop | None:
    """The loop that a run of calls is, or None where what flows between them is not regular."""
    values = [_values(call) for call in calls]
    if len({len(v) for v in values}) > 1:
        return None
    # What one call makes, the next one alone may use: nothing else is carried through the loop.
    for call, made, after in zip(calls, values, calls[1:], strict=False):
        users = {u for v in made for u in v.users} - set(_parts(call))
        if users - {after}:
            return None
    patterns: dict[str, list[Any]] = {}
    for call, before in zip(calls[1:], values, strict=False):
        pattern = [_source(a, before) for a in call.args]
        if patterns.setdefault(str(call.target), pattern) != pattern:
            return None
    first = str(calls[0].target)
    if first not in patterns:
        patterns[first] = _pattern_of_first(calls[0], list(patterns.values()))
    carried = list(range(len(values[0])))
    if any(sorted(p for p in each if isinstance(p, int)) != carried for each in patterns.values()):
        return None
    initial: list[Any] = [None] * len(carried)
    if len(calls[0].args) != len(patterns[first]):
        return None
    for source, arg in zip(patterns[first], calls[0].args, strict=True):
        if isinstance(source, int):
            initial[source] = arg
        elif source is not arg:
            return None
    return Loop(container, calls, patterns, initial, values[-1])


def _pattern_of_first(call: fx.Node, others: list[list[Any]]) -> list[Any]:
    """What the first call's arguments stand for, where no later one is of its block.

    What others are given every time, and an input of the body, it is given too; the rest are what
    the carried values begin with, in their order or in that of another block.
    """
    constants = {a for each in others for a in each if isinstance(a, fx.Node)}
    fixed = [a in constants or _is_input(a) for a in call.args]
    for each in others:
        if len(each) == len(fixed) and all(
            isinstance(source, int) != same and (not same or source is arg)
            for source, same, arg in zip(each, fixed, call.args, strict=True)
        ):
            return each
    for each in others:  # what all are given may be what the first begins with, too
        if len(each) == len(fixed) and all(
            isinstance(source, int) or source is arg
            for source, arg in zip(each, call.args, strict=True)
        ):
            return each
    numbers = itertools.count()
    return [a if same else next(numbers) for a, same in zip(call.args, fixed, strict=True)]


def _is_input(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and arg.op == "placeholder"


def _source(arg: Any, before: list[fx.Node]) -> int | Any:
    """Which of the previous call's results an argument is, or the argument itself."""
    return before.index(arg) if arg in before else arg


def _together(nodes: list[fx.Node], loop: Loop) -> bool:
    """Whether nothing but the loop's own nodes stands between its first and its last call."""
    own = {*loop.calls, *(p for c in loop.calls for p in _parts(c))}
    first, last = nodes.index(loop.calls[0]), nodes.index(loop.calls[-1])
    return all(n in own or n.op == "get_attr" for n in nodes[first : last + 1])
