"""Where each layer sits in the served model's module tree, and how checkpoint names lead there.

The module tree follows the checkpoint's names: quantisation ignore lists and LoRA adapters name
modules by them. A parameter without such a name, or in a place that its block does not own, is
named by its path; `Plan.tensors` then says what the loader has to rename.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from compiler import dotted, layers
from compiler.experts_place import expert_tensors, experts_name, leaves_of, without_spread
from compiler.ir import Block, Program, binding
from compiler.names import identifier, unique
from compiler.recurrence import recurrence
from compiler.rewrite import is_param
from compiler.shared_tensors import MARK, stem, whole_modules
from compiler.split import Split
from compiler.taken_apart import TakenApart
from funcmodels import ops
from funcmodels.errors import LoweringError
from funcmodels.weightmap import TensorMap

NORMS = (layers.add_rms_norm, ops.rms_norm, ops.layer_norm)
WITHOUT_WEIGHTS = {
    recurrence: "recurrence",
    layers.rotary: "rotary_emb",
    layers.attention: "attn",
    layers.latent_attention: "attn",
    layers.silu_and_mul: "act_fn",
    layers.gelu_and_mul: "act_fn",
}


class Destination(NamedTuple):  # a tuple: a mixture of experts has tens of thousands
    """Where a tensor of the checkpoint goes.

    Args:
        param: the module parameter's full name.
        shard: which part of a fused parameter it is: "q", "k", "v", or an index; None for all.
        leaf, fused: the last module's name before and after fusing, where it is fused.
        layout: einops pattern from the checkpoint's layout to the layer's, None for the same.
        sizes: the axes' sizes that the pattern needs.
    """

    param: str
    shard: str | int | None = None
    leaf: str = ""
    fused: str = ""
    layout: str | None = None
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass
class Placed:
    """A block's layers, calls and bare parameters, by their attribute paths."""

    layers: dict[fx.Node, str] = field(default_factory=dict)
    calls: dict[fx.Node, str] = field(default_factory=dict)
    bare: dict[str, str] = field(default_factory=dict)
    anchors: list[str] = field(default_factory=list)  # module path of each of its instances
    leaves: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of experts: their matrices


@dataclass
class Plan:
    """The module tree of a served model.

    Args:
        inner: the attribute, and module path, of the model without its head: "model".
        blocks: by block name; the root's two parts under "forward" and "compute_logits".
        tensors: checkpoint tensor -> where it goes.
        split: checkpoint tensor that holds all experts -> each one's name, with {} for the expert.
        fused: fused module name -> the checkpoint's module names, for `packed_modules_mapping`.
        lora_targets: the checkpoint's names of linears and embeddings that adapters may change.
        tied: whether the unembedding's table is the embedding's.
        head: path of that table, where the unembedding is a layer.
    """

    inner: str
    blocks: dict[str, Placed] = field(default_factory=dict)
    tensors: dict[str, Destination] = field(default_factory=dict)
    split: dict[str, str] = field(default_factory=dict)
    fused: dict[str, list[str]] = field(default_factory=dict)
    lora_targets: list[str] = field(default_factory=list)
    tied: bool = False
    head: str | None = None


def plan_modules(program: Program, split: Split) -> Plan:
    """Place every layer of a lowered program."""
    return _Planner(program, split).run()


class _Planner:
    def __init__(self, program: Program, split: Split) -> None:
        self.program = program
        self.split = split
        self.maps = program.model.tensor_maps
        self.names: dict[str, str] = {}  # path of a parameter -> of its tensor
        # The model without its head sits where its tensors' names begin, or, where they share no
        # beginning, at "model", as if they all began so.
        modules = [dotted.module(self.maps[path].names[0]) for path in split.body.params]
        shared = dotted.common(modules).split(".")[0]
        self.prefix = "" if shared and shared not in modules else "model"
        self.plan = Plan(inner=self.prefix or shared)
        self.parts: dict[str, list[str]] = {}  # fused module name -> what its parts are called
        apart = program.model.shared if isinstance(program.model, TakenApart) else {}
        self.whole = whole_modules(apart)
        self.counts = {stem(shared.parts[0][0]): len(shared.parts) for shared in apart.values()}
        copies = program.model.repeated if isinstance(program.model, TakenApart) else {}
        self.copies = {stem(dotted.module(name)) for names in copies.values() for name in names}

    def run(self) -> Plan:
        own = {name: name for name in self.program.root.params}
        self.visit(self.split.body, own, self.plan.inner)
        shared = set(self.split.head.params) & set(self.split.body.params)
        self.plan.tied = bool(shared)
        heads = [n for n in self.split.head.graph.nodes if n.target is layers.logits]
        if shared and heads:
            self.plan.lora_targets.append("lm_head")
        tables = [str(param.target) for n in heads for param in n.all_input_nodes]
        self.plan.head = next((path for path in tables if path in shared), None)
        self.prefix = ""
        self.visit(self.split.head, own, "", skip=shared)
        if shared:  # tied weights still make a layer, as adapters and the engine expect
            placed = self.plan.blocks[self.split.head.name].layers
            placed.update({n: "lm_head" for n in placed if n.target is layers.logits})
        return self.plan

    def visit(
        self, block: Block, names: dict[str, str], anchor: str, skip: frozenset | set = frozenset()
    ) -> None:
        """Place a block's instance at `anchor`; `names` has each parameter's path in the model."""
        if block.name not in self.plan.blocks:
            self.plan.blocks[block.name] = self.place(block, names, anchor)
        placed = self.plan.blocks[block.name]
        placed.anchors.append(anchor)
        for node, attr in placed.layers.items():
            if node.target is layers.linear:
                self.linear(node, names, dotted.join(anchor, attr))
            elif node.target is layers.experts:
                self.experts(node, names, dotted.join(anchor, attr))
                placed.leaves[attr] = leaves_of(node, names, self.maps)
            elif node.target not in WITHOUT_WEIGHTS:
                for param in _params(node):
                    if str(param.target) not in skip:
                        kind = _weight_name(node, param)
                        self.send(names[str(param.target)], f"{dotted.join(anchor, attr)}.{kind}")
                        if node.target not in NORMS:
                            map_ = self.maps[names[str(param.target)]]
                            self.lora_target(map_, (map_.axes[:1], map_.axes[1:]))
        for name, attr in placed.bare.items():
            self.send(names[name], dotted.join(anchor, attr))
        for call, attr in placed.calls.items():
            inner = {k: names[v] for k, v in binding(call).items()}
            self.visit(self.program.blocks[str(call.target)], inner, dotted.join(anchor, attr))

    # Names within a block

    def place(self, block: Block, names: dict[str, str], anchor: str) -> Placed:
        placed = Placed()
        taken: set[str] = set()

        def take(attr: str, *, in_list: bool = False) -> str:
            attr = unique(dotted.attribute(attr, in_list), taken)
            taken.add(attr)
            return attr

        in_layers: set[str] = set()
        calls = self.call_names(block, names, anchor)
        for node in block.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in WITHOUT_WEIGHTS:
                placed.layers[node] = take(WITHOUT_WEIGHTS[node.target])
            elif _is_layer(node):
                in_layers |= {str(p.target) for p in _params(node)}
                placed.layers[node] = take(self.layer_name(node, names, anchor, calls.values()))
        lists = (
            dotted.lists(calls.values(), placed.layers.values()) if block is self.split.body else ()
        )
        for node, attr in calls.items():
            placed.calls[node] = take(attr, in_list=dotted.parent(attr) in lists)
        for node in block.graph.nodes:
            holders = {n for n in placed.layers if n.target not in WITHOUT_WEIGHTS}
            name = str(node.target)
            if is_param(node) and (set(node.users) - holders) and name not in placed.bare:
                if name in in_layers:
                    raise LoweringError(
                        f"the parameter {names[name]} is used by a layer and outside it",
                        need="a parameter of a vLLM layer to be used by that layer alone",
                        from_=node.meta["where"],
                        fix="declare a second parameter, or write the product with plain torch",
                    )
                placed.bare[name] = take(identifier(name))
        return placed

    def layer_name(
        self, node: fx.Node, names: dict[str, str], anchor: str, calls: Iterable[str]
    ) -> str:
        """The attribute of a layer: the checkpoint's name for it, below the block's own place.

        Not below a called block's, which holds its own layers alone.
        """
        if node.target is layers.logits:
            return "lm_head"  # what vLLM's adapters look for, whatever the checkpoint calls it
        weights = [str(p.target) for p in _weights(node)]
        modules = [dotted.module(self.tensor(names[w])) for w in weights]
        if node.target is layers.experts:
            return experts_name([dotted.below(dotted.parent(m), anchor) for m in modules])
        parents = {dotted.parent(m) for m in modules}
        is_part = MARK in "".join(modules)
        one = len(modules) > 1 and len({stem(m) for m in modules}) == 1
        if one and self.is_whole(weights, names):
            modules, is_part = [stem(modules[0])], False
        below = dotted.below(modules[0], anchor)
        if len(parents) == 1 and below is not None and not is_part:
            leaf = dotted.fused_name([m.rpartition(".")[2] for m in modules])
            if not any(below.startswith(f"{inner}.") for inner in calls):
                return dotted.join(dotted.parent(below), leaf)
        return dotted.fused_name([identifier(w) for w in weights])

    def call_names(self, block: Block, names: dict[str, str], anchor: str) -> dict[fx.Node, str]:
        """The attribute of each called block: where the checkpoint keeps its parameters."""
        paths = {c: [names[outer] for outer in binding(c).values()] for c in block.calls}
        if block is self.split.body:
            paths = {c: dotted.of_one_element(p) for c, p in paths.items()}
        places = {c: self.home(p) for c, p in paths.items()}
        at = Counter(places.values())

        def clashes(call: fx.Node) -> bool:
            """Whether a block's place is its caller's, outside it, or another block's too."""
            return not dotted.below(places[call], anchor) or at[places[call]] > 1

        def move(call: fx.Node, place: str) -> None:
            at.subtract([places[call]])
            at.update([place])
            places[call] = place

        for call, all_paths in paths.items():
            if clashes(call):  # norms often live elsewhere than their block
                matrices = [p for p in all_paths if len(self.program.model.by_path[p].shape) > 1]
                move(call, self.home(matrices))
        own = {call: dotted.common(all_paths) for call, all_paths in paths.items()}
        steps = {  # a layer whose tensors lie elsewhere is where its parameters are
            call: dotted.at_index(place, own[call])
            or dotted.at_index(dotted.join(anchor, own[call]), own[call])
            for call, place in places.items()
        }
        for call in _crowded(steps):  # several calls for one element: each at its own part of it
            steps[call] = places[call]
        crowded = _crowded(steps)
        for call in paths:
            if block is self.split.body:
                step = None if call in crowded else steps[call]
                move(call, step or dotted.join(anchor, identifier(own[call] or _plain(call))))
            elif clashes(call):
                move(call, dotted.join(anchor, _plain(call)))
        return {c: dotted.below(place, anchor) or _plain(c) for c, place in places.items()}

    def home(self, paths: list[str]) -> str:
        """The deepest module that holds the tensors of some parameters."""
        modules = [dotted.module(self.tensor(path)) for path in paths]
        place = dotted.common(modules)
        return dotted.parent(place) if place in modules else place

    # Tensors

    def tensor(self, path: str) -> str:
        """The checkpoint's name of a parameter, with the beginning of the module tree."""
        if path not in self.names:
            self.names[path] = without_spread(self.maps[path])
        return dotted.join(self.prefix, self.names[path])

    def linear(self, node: fx.Node, names: dict[str, str], module: str) -> None:
        """Send the weights and biases of a linear to its parameters."""
        weights, biases = node.args[1], node.args[2]
        parts = _shards(node.kwargs["kind"], len(weights))  # type: ignore[arg-type]
        fused = module.rpartition(".")[2]
        leaves = self.leaves(weights, names)  # type: ignore[arg-type]
        if len(leaves) > 1:  # vLLM has one list of parts for all layers of a name
            leaves = self.parts.setdefault(fused, leaves)
            assert len(leaves) == len(weights), f"{fused} has other parts elsewhere: {leaves}"  # type: ignore[arg-type]
            inside = [*dict.fromkeys(map(stem, leaves))]
            if len(inside) > 1 or self.is_whole([str(w.target) for w in weights], names):  # type: ignore[union-attr]
                self.plan.fused[fused] = inside
        for kind, params in (("weight", weights), ("bias", biases)):
            rows = zip(parts, params, node.kwargs["matrices"], leaves, strict=False)  # type: ignore[arg-type]
            for shard, param, matrix, leaf in rows:
                path = names[str(param.target)]  # type: ignore[union-attr]
                map_ = self.maps[path]
                layout = _layout(map_, matrix if kind == "weight" else None)
                if kind == "weight" and not is_given(node):
                    sides = _sides(map_, matrix)
                    own = self.whole.get(stem(dotted.module(map_.names[0]))) == len(leaves)
                    own &= module == stem(dotted.module(self.tensor(path)))
                    self.lora_target(map_, sides, own)
                self.plan.tensors[map_.names[0]] = Destination(
                    f"{module}.{kind}",
                    shard,
                    leaf,
                    fused if shard is not None else "",
                    layout,
                    map_.sizes if layout else (),
                )

    def experts(self, node: fx.Node, names: dict[str, str], module: str) -> None:
        """Send the tensors of experts to their layer, one expert at a time."""
        for found in expert_tensors(node, names, self.maps, module):
            if found.template is not None:
                self.plan.split[found.names[0]] = found.template
            own = found.names if found.template is None else found.parts
            for name, part in zip(own, found.parts, strict=True):
                self.plan.tensors[name] = Destination(part, layout=found.layout, sizes=found.sizes)

    def is_whole(self, weights: list[str], names: dict[str, str]) -> bool:
        """Whether parts of one tensor are all of it."""
        tensor = self.maps[names[weights[0]]].names[0]
        return len(weights) == self.counts.get(stem(dotted.module(tensor)), len(weights))

    def leaves(self, weights: list[fx.Node], names: dict[str, str]) -> list[str]:
        """What the parts of a layer are called in it: as in the checkpoint, where that differs."""
        paths = [names[str(weight.target)] for weight in weights]
        found = [dotted.module(self.tensor(path)).rpartition(".")[2] for path in paths]
        if len(set(found)) == len(found):
            return found
        return [identifier(str(weight.target)) for weight in weights]

    def lora_target(
        self, map_: TensorMap, sides: tuple[Sequence[str], Sequence[str]], is_all: bool = False
    ) -> None:
        """Let adapters change a matrix, unless their rows would lie otherwise than the layer's.

        One that holds several parameters they change as a whole: where the layer is all of it,
        under its name. Of copies they would change the one that has the matrix's own name, or none.
        """
        module = dotted.module(map_.names[0])
        if stem(module) in self.copies or (MARK in module and not is_all):
            return
        if _in_order(map_.layout, tuple(map(tuple, sides))):
            self.plan.lora_targets.append(stem(module))

    def send(self, path: str, param: str) -> None:
        map_ = self.maps[path]
        if len(map_.names) > 1:
            raise LoweringError(
                f"{path} is spread over {len(map_.names)} tensors of the checkpoint",
                need="one tensor for a parameter that is used outside a fused layer",
                from_=self.program.model.by_path[path].where,
                fix="store it as one tensor, without an axis in braces",
            )
        layout = None if map_.is_identity else f"{map_.layout} -> {' '.join(map_.axes)}"
        to = Destination(param, layout=layout, sizes=map_.sizes if layout else ())
        name = next(iter(map_.names))
        if self.plan.tensors.setdefault(name, to) != to:
            raise LoweringError(
                f"the parameter {path} is read in two places of the served model",
                got=f"{self.plan.tensors[name].param} and {param}",
                need="one place for a tensor of the checkpoint, or an embedding with ops.unembed",
                from_=self.program.model.by_path[path].where,
                fix="declare a second parameter",
            )


def is_given(node: fx.Node) -> bool:
    """Whether a layer is handed to another one, which calls it or multiplies in its own way."""
    return node.target is layers.linear and any(
        user.target is layers.latent_attention and user.args[4] is node for user in node.users
    )


def _is_layer(node: fx.Node) -> bool:
    """Whether a node becomes a module that holds parameters."""
    if node.target in (layers.linear, layers.experts, layers.vocab_embedding, layers.logits):
        return True
    return (
        node.target in NORMS
        and bool(_params(node))
        and all(is_param(a) for a in node.args[_first_weight(node) :] if isinstance(a, fx.Node))
    )


def _first_weight(node: fx.Node) -> int:
    return 2 if node.target is layers.add_rms_norm else 1


def _params(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if is_param(n)]


def _weights(node: fx.Node) -> list[fx.Node]:
    """The parameters that a layer is named after."""
    if node.target is layers.experts:
        return list(node.args[3])  # type: ignore[arg-type]
    return list(node.args[1]) if node.target is layers.linear else _params(node)[:1]  # type: ignore[arg-type]


def _weight_name(node: fx.Node, param: fx.Node) -> str:
    """The name that vLLM's layer has for one of its parameters."""
    if node.target is ops.layer_norm and param is not _params(node)[0]:
        return "bias"
    return "weight"


def _shards(kind: str, count: int) -> tuple[str | int | None, ...]:
    """How vLLM's fused layers call their parts."""
    if kind == "qkv":
        return ("q", "k", "v")
    return tuple(range(count)) if count > 1 else (None,)


def _layout(map_: TensorMap, matrix: layers.Matrix | None) -> str | None:
    """From the checkpoint's layout to the layer's [out, in]; None where they are the same."""
    sides = None if matrix is None else (matrix.out_dims, matrix.in_dims)
    return _pattern(map_.axes, map_.layout, sides)


@functools.cache
def _pattern(axes: tuple[str, ...], layout: str, sides: tuple | None) -> str | None:
    """As above, of some axes: the dims of a matrix's sides, or all in one."""
    groups = [axes] if sides is None else [[axes[d] for d in dims] for dims in sides]
    # A weight without axes of the result makes one number: a matrix of one row.
    want = " ".join(f"({' '.join(s)})" if len(s) > 1 else " ".join(s) or "1" for s in groups)
    have = " ".join(layout.split())
    return None if have == want else f"{have} -> {want}"


@functools.cache
def _in_order(layout: str, sides: tuple[tuple[str, ...], ...]) -> bool:
    """Whether a checkpoint stores the axes of each side in the layer's order."""
    stored = re.findall(r"\w+", layout)
    return all([axis for axis in stored if axis in side] == list(side) for side in sides)


def _sides(map_: TensorMap, matrix: layers.Matrix) -> tuple[list[str], list[str]]:
    """The axes that a product makes, and those it sums over."""
    made, summed = ([map_.axes[d] for d in dims] for dims in (matrix.out_dims, matrix.in_dims))
    return made, summed


def _crowded(steps: dict[fx.Node, str | None]) -> set[fx.Node]:
    """The calls whose place is another call's too, lies in one or holds one; or is none."""
    at = Counter(step for step in steps.values() if step)
    inside = Counter(outer for step in at.elements() for outer in dotted.around(step))
    return {
        call
        for call, step in steps.items()
        if not step or inside[step] > 1 or any(at[outer] for outer in dotted.around(step)[1:])
    }


def _plain(call: fx.Node) -> str:
    """A block's name without the number that tells its recordings apart: layers name it alike."""
    name, _, number = str(call.target).rpartition("_")
    return name if name and number.isdigit() else str(call.target)
