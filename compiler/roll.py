"""The calls of a list's blocks one after another -> a loop, for emission."""

from __future__ import annotations

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
        pattern: for each argument, the carried value it is, or the node it is every time.
        initial: what the carried values are before the first call, None where the block takes that.
        results: the nodes that are the carried values after the last call.
    """

    container: str
    calls: list[fx.Node]
    pattern: list[int | fx.Node]
    initial: list[fx.Node | None]
    results: list[fx.Node]


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
    if len({len(v) for v in values}) > 1 or len({len(c.args) for c in calls}) > 1:
        return None
    # What one call makes, the next one alone may use: nothing else is carried through the loop.
    for call, made, after in zip(calls, values, calls[1:], strict=False):
        users = {u for v in made for u in v.users} - set(_parts(call))
        if users - {after}:
            return None
    pattern: list[Any] = []
    initial: list[Any] = [None] * len(values[0])
    for j in range(len(calls[0].args)):
        sources = [_source(c.args[j], before) for c, before in zip(calls[1:], values, strict=False)]
        if any(s != sources[0] for s in sources):
            return None
        source = sources[0]
        if isinstance(source, int):
            initial[source] = calls[0].args[j]
        elif source is not calls[0].args[j]:
            return None
        pattern.append(source)
    if {p for p in pattern if isinstance(p, int)} != set(range(len(values[0]))):
        return None
    return Loop(container, calls, pattern, initial, values[-1])


def _source(arg: Any, before: list[fx.Node]) -> int | Any:
    """Which of the previous call's results an argument is, or the argument itself."""
    return before.index(arg) if arg in before else arg


def _together(nodes: list[fx.Node], loop: Loop) -> bool:
    """Whether nothing but the loop's own nodes stands between its first and its last call."""
    own = {*loop.calls, *(p for c in loop.calls for p in _parts(c))}
    first, last = nodes.index(loop.calls[0]), nodes.index(loop.calls[-1])
    return all(n in own or n.op == "get_attr" for n in nodes[first : last + 1])
