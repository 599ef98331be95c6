"""A lowered program -> what each of its blocks holds, computes and sends, on one rank.

Nothing is decided here: modules are where `compiler.modules` places them, statements and
constructors are those that `compiler.emit` writes, stages are those of `compiler.stages`.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx

from compiler import collectives, layers
from compiler.emit.block import is_part, statement
from compiler.emit.layers import BUILDERS, Layer
from compiler.emit.scope import Scope
from compiler.emit.whole import module_of
from compiler.explain.records import BlockView, Parameter, Stage, Step
from compiler.explain.sent import Sent
from compiler.explain.sizes import VOCAB_LAYERS, Setting, Sizes
from compiler.explain.work import Costs
from compiler.ir import Block, binding, target_name
from compiler.modules import NORMS, Placed, plan_modules
from compiler.partition import Partitioned
from compiler.placement import Shard
from compiler.refuse import defined
from compiler.rewrite import is_param
from compiler.split import split_at_unembedding
from compiler.stages import layers_of_stages, root_of
from compiler.why import is_product, is_view, why_plain
from funcmodels.source import SourceLine
from funcmodels.spec import Param


@dataclass(frozen=True)
class _Instance:
    """A module of a block: where it is, its parameters' paths, and the stages it is on."""

    module: str
    names: dict[str, str]
    held: tuple[int, ...]
    runs: int


class Inventory:
    """The blocks of a served model, and the totals of each pipeline stage."""

    def __init__(self, program: Partitioned, setting: Setting) -> None:
        self.program = program
        self.setting = setting
        self.split = split_at_unembedding(program)
        self.plan = plan_modules(program, self.split)
        self.root = root_of(self.split.body, self.plan.blocks["forward"])
        self.module = module_of(program)
        self.gathered = {g.where for g in program.gathered}
        self.sizes = Sizes(setting)
        self.costs = Costs(program.model, self.sizes)
        self.sent = Sent(self.sizes, self.gathered)
        self.texts: dict[SourceLine, str] = {}
        self.instances: dict[str, list[_Instance]] = {}
        own = {name: name for name in program.root.params}
        everywhere = tuple(range(setting.pp))
        self._find(self.split.body, _Instance(self.plan.inner, own, everywhere, 0))
        has_logits = any(
            n.target is layers.logits for n in self.plan.blocks["compute_logits"].layers
        )
        last = setting.pp - 1
        held = (last,) if has_logits else everywhere
        self._find(self.split.head, _Instance("", own, held, last))

    def blocks(self) -> tuple[BlockView, ...]:
        """The body, the blocks that it calls, callers first, and the output layer."""
        called = [self.program.blocks[name] for name in self.instances if name not in _ROOTS]
        return tuple(map(self._view, [self.split.body, *called, self.split.head]))

    def unread(self, blocks: tuple[BlockView, ...]) -> tuple[str, ...]:
        """The parameters that nothing reads: they are declared, and not served."""
        told = {path for block in blocks for p in block.parameters for path in p.paths}
        return tuple(path for path in self.program.model.by_path if path not in told)

    def stages(self, blocks: tuple[BlockView, ...]) -> tuple[Stage, ...]:
        """The totals of each stage."""
        count = self.setting.pp
        numbers = layers_of_stages(self.root.layers, count)
        sends = [0] * count
        for i, after in enumerate(numbers[1:]):
            values = [value.node for value in self.root.carried if after.start in value.to]
            sends[i] = sum(map(self.sizes.bytes, values))
        return tuple(_stage(i, blocks, numbers[i], sends[i]) for i in range(count))

    # Where blocks are

    def _find(self, block: Block, at: _Instance) -> None:
        self.instances.setdefault(block.name, []).append(at)
        placed = self.plan.blocks[block.name]
        for call, attr in placed.calls.items():
            inner = {k: at.names[v] for k, v in binding(call).items()}
            held, runs = at.held, at.runs
            if block is self.split.body:
                held, runs = self._stages_of(call)
            module = f"{at.module}.{attr}" if at.module else attr
            callee = self.program.blocks[str(call.target)]
            self._find(callee, _Instance(module, inner, held, runs))

    def _stages_of(self, node: fx.Node) -> tuple[tuple[int, ...], int]:
        """The stages that hold a statement of the body's, and the one that runs it."""
        last = self.setting.pp - 1
        everywhere = tuple(range(last + 1))
        number = self.root.layer_of(node)
        if number is not None:
            cut = layers_of_stages(self.root.layers, last + 1)
            stage = next(i for i, numbers in enumerate(cut) if number in numbers)
            attr = self.plan.blocks["forward"].calls.get(node, "")
            of_layer = attr.startswith(f"{self.root.container}.")
            return ((stage,) if of_layer else everywhere), stage
        runs = last if node in self.root.after else 0
        if node not in self.plan.blocks["forward"].layers:
            return everywhere, runs  # bare parameters and single blocks are made on all
        if self.plan.tied and node.target is layers.vocab_embedding:
            return tuple(dict.fromkeys((0, last))), runs
        return (runs,), runs

    def _held(self, block: Block, node: fx.Node, at: _Instance) -> tuple[int, ...]:
        if block is self.split.body and node.op == "call_function":
            return self._stages_of(node)[0]
        return at.held

    # One block

    def _view(self, block: Block) -> BlockView:
        placed = self.plan.blocks[block.name]
        scope = Scope(self.module, block, placed)
        for node in block.inputs:
            scope.bind(node)
        made: dict[fx.Node, Layer] = {}
        steps = tuple(self._steps(block, scope, made))
        at = self.instances[block.name]
        runs = [i.runs for i in at]
        stages = tuple(runs.count(s) for s in range(self.setting.pp))
        results = tuple(dict.fromkeys(_maker(r).name for r in block.results))
        root = block.name in _ROOTS
        return BlockView(
            block.name,
            self.program.model.name if root else self.module.class_name(block.name),
            tuple(i.module for i in at),
            stages,
            tuple(n.name for n in block.inputs),
            steps,
            results,
            defined(block.function) if block.function else None,
            tuple(self._parameters(block, placed, made)),
            tuple((k, repr(v)) for k, v in block.static.items() if isinstance(v, _PLAIN)),
        )

    def _steps(self, block: Block, scope: Scope, made: dict[fx.Node, Layer]) -> Iterator[Step]:
        for node in block.graph.nodes:
            if node.op not in ("call_function", "call_module") or is_part(node):
                continue
            code = "\n".join(statement(scope, node, 0))
            attr = scope.placed.layers.get(node, scope.placed.calls.get(node, ""))
            if node in scope.placed.layers:
                made[node] = BUILDERS[node.target](scope, node, attr)
            where = node.meta["where"]
            kind = self._kind(node, made)
            plain = kind in ("plain", "view")
            yield Step(
                name=node.name,
                kind=kind,
                title=self._title(node, made),
                attr=attr,
                code=code,
                where=where,
                text=self._text(where),
                shape=self._shape(node),
                arguments=tuple(made[node].arguments) if node in made else (),
                why=why_plain(node, self.gathered) if plain else "",
                inputs=_inputs(node),
                parameters=tuple(str(n.target) for n in node.all_input_nodes if is_param(n)),
                work=self.costs.of(node, in_head=block is self.split.head),
                collective=self.sent.of(node, in_head=block is self.split.head),
                is_product=kind == "plain" and is_product(node),
            )

    def _kind(self, node: fx.Node, made: dict[fx.Node, Layer]) -> str:
        if node.op == "call_module":
            return "block"
        if node in made:
            return "layer"
        if node.target in (collectives.all_reduce, collectives.all_gather):
            return "collective" if self.setting.tp > 1 else "view"
        return "view" if is_view(node) else "plain"

    def _title(self, node: fx.Node, made: dict[fx.Node, Layer]) -> str:
        if node in made:
            return made[node].constructor
        return str(node.target) if node.op == "call_module" else target_name(node.target)

    def _shape(self, node: fx.Node) -> str:
        return "[" + ", ".join(map(str, self.sizes.local(node))) + "]"

    def _text(self, where: SourceLine) -> str:
        if where not in self.texts:
            self.texts[where] = linecache.getline(where.file, where.line).strip()
        return self.texts[where]

    # Parameters

    def _parameters(
        self, block: Block, placed: Placed, made: dict[fx.Node, Layer]
    ) -> Iterator[Parameter]:
        for node, attr in placed.layers.items():
            for param, leaf, part in _parts(node):
                if block is self.split.head and self.plan.tied and node.target is layers.logits:
                    continue  # the embedding's own
                yield from self._folded(block, node, param, made[node], f"{attr}.{leaf}", part)
        for name, attr in placed.bare.items():
            param = next(
                n for n in block.graph.nodes if n.op == "get_attr" and str(n.target) == name
            )
            yield from self._folded(block, param, param, None, attr, "")

    def _folded(
        self, block: Block, node: fx.Node, param: fx.Node, layer: Layer | None, attr: str, part: str
    ) -> Iterator[Parameter]:
        """A parameter of a block in each of its modules, those of one name together."""
        found: dict[tuple[str, str], list[_Instance]] = {}
        name = str(param.target)
        for at in self.instances[block.name]:
            found.setdefault((folded(at.names[name]), folded(_of(at, attr))), []).append(at)
        for (path, module), at in found.items():
            held = [s for i in at for s in self._held(block, node, i)]
            yield self._parameter(
                block.params[name],
                param,
                layer,
                name=name,
                step=node.name if layer is not None else "",
                path=path,
                paths=tuple(i.names[name] for i in at),
                module=module,
                modules=tuple(_of(i, attr) for i in at),
                part=part,
                lora=layer is not None and self._is_adapted(at[0].names[name]),
                quantisable=layer is not None and node.target in (layers.linear, layers.experts),
                stages=tuple(held.count(s) for s in range(self.setting.pp)),
            )

    def _is_adapted(self, path: str) -> bool:
        """Whether adapters may change the layer of a parameter."""
        tensor = self.program.model.tensor_maps[path].names[0]
        return tensor.removesuffix(".weight") in self.plan.lora_targets

    def _parameter(
        self,
        declared: Param,
        node: fx.Node,
        layer: Layer | None,
        *,
        name: str,
        step: str,
        path: str,
        paths: tuple[str, ...],
        module: str,
        modules: tuple[str, ...],
        part: str,
        lora: bool,
        quantisable: bool,
        stages: tuple[int, ...],
    ) -> Parameter:
        weight = module.endswith("weight")
        # A layer that is not told a dtype has the model's, whatever was declared.
        told = layer is None or any("dtype=" in a for a in layer.arguments)
        dtype = (declared.dtype if told else None) or self.setting.dtype
        shape = self.sizes.param_shape(node, layer is not None)
        at, tp = node.meta["placement"], self.setting.tp
        extra = prod(shape) - prod(self.sizes.local(node))
        return Parameter(
            name=name,
            step=step,
            path=path,
            paths=paths,
            shape=declared.shape,
            axes=declared.axes,
            local_shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            bytes=prod(shape) * dtype.itemsize,
            padding=max(0, extra) * dtype.itemsize,
            replicas=max(1, tp // at.units) if isinstance(at, Shard) else tp,
            layer=layer.constructor if layer else "nn.Parameter",
            module=module,
            modules=modules,
            part=part,
            is_quantisable=quantisable and weight,
            is_lora_target=lora and weight,
            where=declared.where,
            stages=stages,
        )


_ROOTS = ("forward", "compute_logits")
_PLAIN = (int, float, str, bool, type(None))


def _of(at: _Instance, attr: str) -> str:
    """A module's parameter in full."""
    return f"{at.module}.{attr}" if at.module else attr


def folded(path: str) -> str:
    """`layers.3.attn.q` as `layers.*.attn.q`."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _stage(i: int, blocks: tuple[BlockView, ...], numbers: range, sends: int) -> Stage:
    counts: dict[str, int] = {}
    size = kv = state = 0
    for block in blocks:
        for step in block.steps:
            kv += step.work.kv_bytes * block.stages[i]
            state += step.work.state_bytes * block.stages[i]
            if step.collective is not None and block.stages[i]:
                kind = step.collective.kind
                counts[kind] = counts.get(kind, 0) + block.stages[i]
                size += step.collective.bytes * block.stages[i]
    weights = sum(p.bytes * p.stages[i] for block in blocks for p in block.parameters)
    return Stage(tuple(numbers), weights, kv, state, counts, size, sends)


def _parts(node: fx.Node) -> Iterator[tuple[fx.Node, str, str]]:
    """The parameters of a layer, each with its name in the layer, and which part of that it is."""
    if node.target is layers.linear:
        weights: Any = node.args[1]
        biases: Any = node.args[2]
        parts = ("q", "k", "v") if node.kwargs["kind"] == "qkv" else range(len(weights))
        several = len(weights) > 1
        for leaf, params in (("weight", weights), ("bias", biases)):
            for part, param in zip(parts, params, strict=False):
                yield param, leaf, str(part) if several else ""
        return
    if node.target is layers.experts:
        for leaf, params in (("weight", node.args[3]), ("bias", node.args[4])):
            three: Any = params
            for part, param in zip(("gate", "up", "down"), three, strict=False):
                if param is not None:
                    which = "w2" if part == "down" else "w13"
                    yield param, f"routed_experts.{which}_{leaf}", part
        return
    params = [n for n in node.all_input_nodes if is_param(n)]
    if node.target in (*NORMS, *VOCAB_LAYERS):
        for param, leaf in zip(params, ("weight", "bias"), strict=False):
            yield param, leaf, ""


def _maker(node: fx.Node) -> fx.Node:
    """The node that made a value: of a part of a tuple, the one that made the tuple."""
    while is_part(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _inputs(node: fx.Node) -> tuple[str, ...]:
    made = (_maker(n).name for n in node.all_input_nodes if not is_param(n))
    return tuple(dict.fromkeys(made))
