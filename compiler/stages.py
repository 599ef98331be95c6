"""Pipeline stages: where the body of a served model is cut, and which layers vLLM puts where."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from compiler.ir import Block, binding, tensor_type
from compiler.modules import Placed
from compiler.placement import Partial
from compiler.rewrite import is_call, is_param
from compiler.roll import Loop, roll


@dataclass
class Root:
    """The statements of a model's body around those of its layers.

    Args:
        before, after: what comes before the first layer, and after the last.
        container: attribute path of the list of the layers; "" for none.
        loop: the calls of the layers, where they are one loop.
        steps: otherwise, the statements from each layer to the next one, by its number.
        carried: what stages send on.
        local: what each stage computes for itself.
    """

    before: list[fx.Node]
    after: list[fx.Node]
    container: str = ""
    loop: Loop | None = None
    steps: list[list[fx.Node]] = field(default_factory=list)
    carried: list[Carried] = field(default_factory=list)
    local: list[fx.Node] = field(default_factory=list)

    @property
    def layers(self) -> int:
        """How many layers can be divided among stages."""
        return len(self.loop.calls) if self.loop else len(self.steps)

    def layer_of(self, node: fx.Node) -> int | None:
        """The number of the layer whose statements a node is among."""
        if self.loop:
            return self.loop.calls.index(node) if node in self.loop.calls else None
        return next((i for i, step in enumerate(self.steps) if node in step), None)


@dataclass(frozen=True)
class Carried:
    """A value that stages send on, and the layers with which a stage may begin that receives it."""

    node: fx.Node
    to: range


def root_of(body: Block, placed: Placed) -> Root:
    """The body in three, where it has layers in one list, called in its order; else in one."""
    items = roll(body, placed)
    loops = [i for i, item in enumerate(items) if isinstance(item, Loop)]
    if len(loops) == 1:
        (at,) = loops
        before = [n for n in items[:at] if isinstance(n, fx.Node)]
        after = [n for n in items[at + 1 :] if isinstance(n, fx.Node)]
        loop = items[at]
        assert isinstance(loop, Loop)
        root = Root(before, after, loop.container, loop)
    else:
        root = _in_steps(body, placed)
    live = _live(body, root)
    root.local = _of_no_tokens(body, placed, root, [value.node for value in live])
    root.carried = [value for value in live if value.node not in root.local]
    return root


def _in_steps(body: Block, placed: Placed) -> Root:
    """The body cut where each layer of its one list is first used."""
    nodes = [n for n in body.graph.nodes if n.op != "output"]
    whole = Root(nodes, [])
    lists = {path for path, _ in map(_element, placed.calls.values()) if path}
    if len(lists) != 1:
        return whole
    (container,) = lists
    owned: list[tuple[int, int]] = []  # the number of a layer, and where a statement of it is
    for at, node in enumerate(nodes):
        attrs = [placed.calls.get(node) or placed.layers.get(node) or ""]
        attrs += [placed.bare.get(str(n.target), "") for n in node.all_input_nodes if is_param(n)]
        owned += [(i, at) for path, i in map(_element, attrs) if path == container]
    numbers = [i for i, _ in owned]
    if numbers != sorted(numbers) or {*numbers} != {*range(max(numbers) + 1)}:
        return whole
    starts = [min(at for i, at in owned if i == number) for number in range(max(numbers) + 1)]
    end = max(at for _, at in owned) + 1
    while end < len(nodes) and is_call(nodes[end], operator.getitem):  # parts of what it returns
        end += 1
    steps = [nodes[a:b] for a, b in itertools.pairwise([*starts, end])]
    return Root(nodes[: starts[0]], nodes[end:], container, None, steps) if steps[1:] else whole


def _element(attr: str) -> tuple[str, int]:
    """`layers.3.norm` as ("layers", 3): which element of which list an attribute is of, if any."""
    parts = attr.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return (".".join(parts[:at]), int(parts[at])) if at else ("", 0)


def _live(body: Block, root: Root) -> list[Carried]:
    """The values that are read in a later stage than they are made in, in their order."""
    _, positions = body.inputs
    last = root.layers
    if root.loop is not None:
        before = {n for n in root.before if n.op != "get_attr"} - {positions}
        read = [n for node in root.after for n in node.all_input_nodes] + root.loop.constants
        later = [n for n in dict.fromkeys(read) if n in before]
        return [Carried(node, range(1, last)) for node in [*root.loop.results, *later]]
    place = dict.fromkeys(root.before, 0) | {
        node: i + 1 for i, step in enumerate(root.steps) for node in step
    }
    for node in place:  # what takes a tuple apart is written with what makes it
        whole: Any = node.args[0] if is_call(node, operator.getitem) else None
        if whole is not None and isinstance(whole.meta["type"], tuple):
            place[node] = place[whole]
    found = []
    for node, made in place.items():
        if node is positions or node.op == "get_attr" or isinstance(node.meta["type"], tuple):
            continue
        read_at = max((place.get(user, last + 1) for user in node.users), default=0)
        if to := range(max(made, 1), min(read_at, last)):
            found.append(Carried(node, to))
    return found


def _of_no_tokens(body: Block, placed: Placed, root: Root, wanted: list[fx.Node]) -> list[fx.Node]:
    """Those values that every stage can make, and what they are made of.

    They depend on the positions, and on parameters that all stages have: those of no layer.
    """
    tokens, positions = body.inputs
    found = {positions}
    for node in body.graph.nodes:
        attr = placed.bare.get(str(node.target)) if node.op == "get_attr" else None
        is_shared = attr is not None and _element(attr)[0] != root.container
        is_plain = node.op == "call_function" and node not in placed.layers
        if is_shared or (is_plain and found.issuperset(node.all_input_nodes)):
            found.add(node)
    needed = set(wanted) & found
    for node in reversed(body.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in body.graph.nodes if node in needed - {tokens, positions}]


def why_one_stage(body: Block, root: Root) -> str | None:
    """Why a model cannot be cut into pipeline stages, or None where it can.

    Stages are cut between layers, and send on what later ones read: values with a row for each
    token.
    """
    if not root.layers:
        return _why_no_layers(body)
    if root.loop is not None and not root.loop.results:
        return "its layers return nothing"
    for value in root.carried:
        where = value.node.meta.get("where")
        shape = tensor_type(value.node).shape
        if not shape or shape[0] != tensor_type(body.inputs[0]).shape[0]:
            return f"what is made at {where} has no row for each token, and a later layer reads it"
        if isinstance(value.node.meta.get("placement"), Partial):
            return f"what is made at {where} is yet to be summed over ranks, in a later layer"
    return None


def _why_no_layers(body: Block) -> str:
    """Why a model's layers are not one list that is gone through in order."""
    lists: dict[str, list[fx.Node]] = {}
    for call in body.calls:
        indexed = (path.split(".") for path in binding(call).values())
        names = {f"{name}.{rest[0]}" for name, *rest in indexed if rest and rest[0].isdigit()}
        for name in names if len(names) == 1 else ():
            lists.setdefault(name.partition(".")[0], []).append(call)
    if not lists:
        return "it has no list of layers"
    if len(lists) > 1:
        return f"its layers are in several lists: {', '.join(lists)}"
    (name,) = lists
    return f"the layers of {name} are not called one after another, from its first to its last"


def layers_of_stages(layers: int, stages: int) -> list[range]:
    """The layers of each stage, as vLLM cuts them.

    Equally many each; of what is left over, one more to each stage from the last but one
    backwards: the last stage has the unembedding to do, and the first the embedding.
    (`VLLM_PP_LAYER_PARTITION`, which sets the numbers by hand, is not looked at.)

    Source: `get_pp_indices` of vLLM 0.32, `vllm/distributed/utils.py`.
    """
    counts = [layers // stages] * stages
    for i in range(layers % stages):
        counts[stages - 2 - i] += 1
    ends = [sum(counts[: i + 1]) for i in range(stages)]
    return [range(end - n, end) for n, end in zip(counts, ends, strict=True)]
