"""The steps that a forward function repeats over a list of parameters -> one block a layer."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from compiler.ir import Block, Program, binding
from compiler.names import unique
from compiler.rewrite import copy_block, is_call

Place = tuple[str, int]  # a list of the parameter tree, and an index into it


def outline_layers(program: Program) -> Program:
    """Gather what happens with each element of a list of parameters into a block of its own.

        for p in params["layers"]:
            x = attention(p["attn"], x, positions); x = mlp(p["mlp"], x)
    ->
        for p in params["layers"]:
            x = layer(p, x, positions)

    A served model wants one module a layer: it is what pipeline stages and the loop are made of.
    Runs on the traced program. Where each step is one block call already, nothing changes; where
    the steps differ in what flows between them, they stay as they are.
    """
    root = copy_block(program.root)
    _read_late(root)
    blocks = dict(program.blocks)
    for segments in _runs(root):
        if all(_is_one_call(s) for s in segments):
            continue
        made: dict[Any, Block] = {}
        for segment in segments:
            shape = _shape(segment)  # now, since it takes what the segment before it became
            if shape.key not in made:
                name = unique("layer", {*blocks, "forward"})
                made[shape.key] = blocks[name] = _outlined(root, shape, name)
            _replace(root, shape, made[shape.key])
    return replace(program, root=root, blocks=blocks)


def _is_one_call(segment: list[fx.Node]) -> bool:
    """Whether a step is a block already: one call, and what takes its results apart."""
    call, *parts = segment
    return call.op == "call_module" and all(
        is_call(part, operator.getitem) and part.args[0] is call for part in parts
    )


def _read_late(root: Block) -> None:
    """Let each parameter be read where it is first used, in the step that it belongs to."""
    order = {n: i for i, n in enumerate(root.graph.nodes)}
    for node in [n for n in root.graph.nodes if n.op == "get_attr" and n.users]:
        min(node.users, key=order.__getitem__).prepend(node)


def _runs(root: Block) -> list[list[list[fx.Node]]]:
    """For each list of parameters, its steps: stretches of consecutive nodes."""
    nodes = [n for n in root.graph.nodes if n.op != "output"]
    first: dict[Place, int] = {}
    for i, node in enumerate(nodes):
        if (place := _place(node)) is not None:
            first.setdefault(place, i)
    found: list[list[list[fx.Node]]] = []
    for name in dict.fromkeys(name for name, _ in first):
        starts = [at for (n, _), at in sorted(first.items(), key=lambda kv: kv[1]) if n == name]
        indices = [i for n, i in first if n == name]
        if len(starts) < 2 or sorted(indices) != list(range(len(indices))):
            continue
        segments = _segments(nodes, starts)
        if segments and all(map(_is_of, segments, ((name, i) for i in indices))):
            found.append(segments)
    return found


def _segments(nodes: list[fx.Node], starts: list[int]) -> list[list[fx.Node]]:
    """The nodes from each start to the next; none where it is not clear how far the last goes.

    The last step is as long as an earlier one that does the same.
    """
    segments = [nodes[a:b] for a, b in itertools.pairwise(starts)]
    rest = nodes[starts[-1] :]
    widths = {len(s) for s in segments}
    if len(widths) == 1:
        last = rest[: len(segments[0])]
        if len({tuple(n.op for n in s) for s in (*segments, last)}) == 1:
            return [*segments, last]
    alike = [len(s) for s in segments if _does(rest[: len(s)]) == _does(s)]
    return [*segments, rest[: max(alike)]] if alike else []


def _is_of(segment: list[fx.Node], place: Place) -> bool:
    """Whether a step is of one element, and of scalars and vectors at that place of other lists."""
    places = {p for n in segment if (p := _place(n)) is not None}
    also = {p for n in segment if n.op == "get_attr" and (p := _place(n)) is not None}
    also = {(name, i) for name, i in also if i == place[1]}
    return place in places and places - also <= {place}


def _does(segment: list[fx.Node]) -> list[Any]:
    """What the nodes of a step are, whatever it is that they are of."""
    return [n.target if n.op == "call_function" else n.op for n in segment]


def _place(node: fx.Node) -> Place | None:
    """Which element of which list a node's parameters are of; None where that is not clear.

    A block that is given a layer's parameters and a scalar of another list is of the layer's list.
    """
    names: list[str] = []
    if node.op == "get_attr":
        names = [str(node.target)]
    elif node.op == "call_module":
        names = list(binding(node).values())
    count = Counter(place for name in names if (place := _split(name)) is not None)
    lists = {name for name, _ in count}
    if len(lists) < len(count):  # two elements of one list
        return None
    most = [place for place, n in count.items() if n == max(count.values())]
    return most[0] if len(most) == 1 else None


def _split(name: str) -> Place | None:
    """`layers.3.attn.q` as ("layers", 3)."""
    head, *rest = name.split(".")
    return (head, int(rest[0])) if rest and rest[0].isdigit() else None


@dataclass
class _Shape:
    """A stretch of nodes as a function: what it takes and gives, and a key equal for equals."""

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    params: dict[str, str]  # name in the block -> name in the root
    key: Any


def _shape(nodes: list[fx.Node]) -> _Shape:
    inside = {n: i for i, n in enumerate(nodes)}
    inputs: dict[fx.Node, int] = {}
    params: dict[str, str] = {}
    inner: dict[str, str] = {}

    def ref(node: fx.Node) -> Any:
        if node in inside:
            return ("inside", inside[node])
        return ("input", inputs.setdefault(node, len(inputs)))

    def local(name: str) -> str:
        """A name that says nothing of the index, so that layers are alike."""
        if name not in inner:
            head, *rest = name.split(".")
            below = rest[1:] if _split(name) else rest
            short = ".".join(below) if below and _split(name) else "_".join([head, *below])
            if short in params:  # of the list's, and of another list or the root's
                short = unique("_".join([head, *below]), params)
            inner[name], params[short] = short, name
        return inner[name]

    key: list[Any] = []
    for node in nodes:
        refs = tuple(ref(n) for n in node.all_input_nodes)
        bound = tuple((k, local(v)) for k, v in node.meta.get("binding", {}).items())
        target = local(str(node.target)) if node.op == "get_attr" else node.target
        static = _without_names(node)
        key.append((node.op, target, static, refs, bound))
    outputs = [n for n in nodes if any(u not in inside for u in n.users)]
    key.append(tuple(inside[n] for n in outputs))
    return _Shape(nodes, list(inputs), outputs, params, tuple(key))


def _without_names(node: fx.Node) -> str:
    """Arguments as text, with the nodes among them by their order alone."""
    order = {n: f"%{i}" for i, n in enumerate(node.all_input_nodes)}
    return str(map_arg((node.args, node.kwargs), order.__getitem__))


def _outlined(root: Block, shape: _Shape, name: str) -> Block:
    """The block of a stretch."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in shape.inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    local = {outer: inner for inner, outer in shape.params.items()}
    for node in shape.nodes:
        new = env[node] = graph.node_copy(node, lambda n: env[n])
        if node.op == "get_attr":
            new.target = local[str(node.target)]
        if node.op == "call_module":
            new.meta["binding"] = {k: local[v] for k, v in binding(node).items()}
    graph.output(tuple(env[n] for n in shape.outputs))
    params = {inner: root.params[outer] for inner, outer in shape.params.items()}
    return Block(name, graph, params)


def _replace(root: Block, shape: _Shape, block: Block) -> None:
    """A call in the place of a stretch."""
    last = shape.nodes[-1]
    with root.graph.inserting_after(last):
        call = root.graph.create_node("call_module", block.name, tuple(shape.inputs))
    types = tuple(n.meta["type"] for n in shape.outputs)
    call.meta.update(where=last.meta["where"], binding=dict(shape.params), type=types)
    if len(types) == 1:
        call.meta["type"] = types[0]
    after = call
    for i, old in enumerate(shape.outputs):
        new = call
        if len(types) > 1:
            with root.graph.inserting_after(after):
                new = after = root.graph.call_function(operator.getitem, (call, i))
            new.meta.update(old.meta)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in shape.nodes)
    for node in reversed(shape.nodes):
        root.graph.erase_node(node)
