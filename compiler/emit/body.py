"""The class of a model without its head: what vLLM compiles, and cuts into pipeline stages."""

from __future__ import annotations

import re

from torch import fx

from compiler.emit.block import constructor, method_lines, parents, statements, symbol_lines
from compiler.emit.scope import Scope
from compiler.emit.staged import StageLines
from compiler.emit.text import call, quoted
from compiler.emit.whole import DYNAMIC
from compiler.ir import MODEL_DTYPE, tensor_type
from compiler.names import unique
from compiler.roll import Loop


class BodyLines(StageLines):
    """Writes it."""

    def model_class(self) -> list[str]:
        m = self.module
        for name in ("torch", "nn", "VllmConfig", "support_torch_compile", "IntermediateTensors"):
            m.use(name)
        forward = self.body_forward()
        return [
            "@support_torch_compile(",
            "    dynamic_arg_dims={",
            *(f'        "{n}": {{0: "num_tokens"}},' for n in DYNAMIC),
            "    },",
            ")",
            f"class {self.body_class}(nn.Module):",
            '    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:',
            "        super().__init__()",
            *self.body_constructor(),
            "",
            *self.embed_lines(),
            "    def forward(",
            "        self,",
            "        input_ids: torch.Tensor | None,",
            "        positions: torch.Tensor,",
            "        intermediate_tensors: IntermediateTensors | None,",
            "        inputs_embeds: torch.Tensor | None = None,",
            "    ) -> torch.Tensor | IntermediateTensors:",
            *forward,
            *method_lines(self.body),
        ]

    def embed_lines(self) -> list[str]:
        """The method that embeds tokens, where they are read for nothing else."""
        node = self.embedding
        if node is None:
            return []
        tokens, _ = self.split.body.inputs
        scope = Scope(self.module, self.split.body, self.body.placed)
        scope.names[tokens] = "input_ids"
        lines = statements(scope, [node], 8)
        return [
            "    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:",
            *(line.replace(f"{scope.names[node]} = ", "return ", 1) for line in lines),
            "",
        ]

    def body_constructor(self) -> list[str]:
        lines = constructor(self.body)
        if self.staged:
            lines = self.by_stage(lines)
        for container in self.containers():
            lines += parents(container, lines)
            lines += self.make_layers(container)
        return lines

    def by_stage(self, lines: list[str]) -> list[str]:
        """Put what is before the loop on the first stage, and what is after it on the last."""
        self.module.use("get_pp_group")
        self.module.use("PPMissingLayer")
        placed = self.body.placed
        first = {a for n, a in placed.layers.items() if n in set(self.root.before)}
        last = {a for n, a in placed.layers.items() if n in set(self.root.after)}
        tied = {placed.layers[n] for n in self.tied_embeddings()}
        out: list[str] = []
        at = 0
        while at < len(lines):
            end = _statement_end(lines, at)
            statement = lines[at:end]
            attr = re.match(r"\s+self\.([\w.]+) = ", statement[0])
            name = attr[1] if attr else ""
            conditions = []
            if name in first:
                conditions.append("get_pp_group().is_first_rank")
            if name in last | tied:
                conditions.append("get_pp_group().is_last_rank")
            if conditions:
                out.append(f"        if {' or '.join(conditions)}:")
                out += [f"    {line}" for line in statement]
                out += ["        else:", f"            self.{name} = PPMissingLayer()"]
            else:
                out += statement
            at = end
        return out

    def containers(self) -> list[str]:
        """Module lists, by attribute path."""
        found = (a.rpartition(".") for a in self.body.placed.calls.values())
        return list(dict.fromkeys(c for c, _, i in found if c and i.isdigit()))

    def make_layers(self, container: str) -> list[str]:
        """The lines that make a list of layers, of one class or of several."""
        m = self.module
        calls = {
            a: c for c, a in self.body.placed.calls.items() if a.rpartition(".")[0] == container
        }
        in_order = (calls[f"{container}.{i}"] for i in range(len(calls)))
        classes = [m.class_name(str(c.target)) for c in in_order]
        if len(set(classes)) == 1:
            make = f"lambda prefix: {classes[0]}(vllm_config, prefix=prefix)"
        else:
            make = "lambda prefix: kinds[int(prefix.rsplit('.', 1)[1])](vllm_config, prefix=prefix)"
        kinds = [] if len(set(classes)) == 1 else _sequence("kinds", classes)
        count = m.size("layers", len(calls))
        prefix = f'prefix=f"{{prefix}}.{container}"'
        if self.staged and container == self.root.container:
            return [
                *kinds,
                *call(
                    f"self.start_layer, self.end_layer, self.{container} = {m.use('make_layers')}",
                    [count, make.replace("'", '"') if kinds else make, prefix],
                    8,
                ),
                *(self.plain_stages() if self.is_plain else self.stage_constructor()),
            ]
        one = classes[0] if not kinds else "kind"
        over = f"for i in range({count})" if not kinds else "for i, kind in enumerate(kinds)"
        inner = f'{one}(vllm_config, prefix=f"{{prefix}}.{container}.{{i}}")'
        return [
            *kinds,
            f"        self.{container} = nn.ModuleList(",
            *(
                [f"            {inner} {over}"]
                if len(inner + over) < 76
                else [f"            {inner}", f"            {over}"]
            ),
            "        )",
        ]

    def plain_stages(self) -> list[str]:
        """What makes room for what a loop carries from layer to layer."""
        m, loop = self.module, self.root.loop
        assert loop is not None
        names = [quoted(n) for n in self.loop_names()]
        (size,) = {t.meta["type"].shape[-1] for t in loop.results}
        dtypes = [tensor_type(t).dtype for t in loop.results]
        if {*dtypes} == {MODEL_DTYPE}:
            factory = m.use("make_empty_intermediate_tensors_factory")
            kept = f"[{', '.join(names)}]"
        else:
            m.use("torch")
            factory = m.help("empty_of")
            own = ("None" if d == MODEL_DTYPE else str(d) for d in dtypes)
            kept = "{" + ", ".join(map("{}: {}".format, names, own)) + "}"
        arguments = [kept, m.size("hidden", size)]
        return call(f"self.make_empty_intermediate_tensors = {factory}", arguments, 8)

    def loop_names(self) -> list[str]:
        """Names of the values that go from layer to layer."""
        loop = self.root.loop
        assert loop is not None
        count = len(loop.results)
        if count <= 2:
            return ["hidden_states", "residual"][:count]
        return [f"carried_{i}" for i in range(count)]

    def body_forward(self) -> list[str]:
        scope, root = self.body, self.root
        tokens, positions = self.split.body.inputs
        scope.bind(tokens, "input_ids")
        scope.bind(positions, "positions")
        local = statements(scope, root.local, 8)
        before = self.before_layers()
        layers = self.loop_lines(before) if root.loop else self.steps()
        after = statements(scope, [n for n in root.after if n not in root.local], 8)
        (result,) = self.split.body.results
        after.append(f"        return {scope.value(result)}")
        start = [*symbol_lines(scope, positions), *local]
        if not self.staged:
            return [*start, *before, *layers, *after]
        if self.is_plain:
            names = self.loop_names()
            received = [f'            {n} = intermediate_tensors["{n}"]' for n in names]
            values = ", ".join(f'"{n}": {n}' for n in names)
            sent = [f"            return IntermediateTensors({{{values}}})"]
        else:
            before += self.first_stage()
            received, sent = self.received(), self.sent()
        return [
            *start,
            "        if get_pp_group().is_first_rank:",
            *(f"    {line}" for line in before),
            "        else:",
            "            assert intermediate_tensors is not None",
            *received,
            *layers,
            "        if not get_pp_group().is_last_rank:",
            *sent,
            *after,
        ]

    def loop_lines(self, before: list[str]) -> list[str]:
        """The loop over the layers; what its variables begin with is added to what is before it."""
        scope, loop, names = self.body, self.root.loop, self.loop_names()
        assert loop is not None
        values = ["None" if i is None else scope.value(i) for i in loop.initial]
        changed = [(n, v) for n, v in zip(names, values, strict=True) if n != v]
        # At once: one of the values may be what another's name has held so far.
        before += [self.keep(node) for node in self.read_later() if scope.names.get(node) in names]
        if changed:
            left, right = (", ".join(side) for side in zip(*changed, strict=True))
            before.append(f"        {left} = {right}")
        for node, carried in zip(loop.results, names, strict=True):
            scope.bind(node, carried)
        over = f"self.{loop.container}"
        if self.staged:
            over = f"{self.module.use('islice')}({over}, self.start_layer, self.end_layer)"
        return [f"        for layer in {over}:", *self.call_layer(loop, names)]

    def call_layer(self, loop: Loop, names: list[str]) -> list[str]:
        """The loop's body: one call, or one for each way in which classes of layers are called."""
        ways: dict[tuple[str, ...], list[str]] = {}
        for block, pattern in loop.patterns.items():
            way = (names[p] if isinstance(p, int) else self.body.value(p) for p in pattern)
            ways.setdefault(tuple(way), []).append(self.module.class_name(block))
        left = f"{', '.join(names)} = layer"
        *others, usual = sorted(ways, key=lambda way: len(ways[way]))
        lines = []
        for i, way in enumerate(others):
            classes = ways[way]
            kinds = classes[0] if len(classes) == 1 else f"({', '.join(classes)})"
            lines.append(f"            {'elif' if i else 'if'} isinstance(layer, {kinds}):")
            lines += call(left, list(way), 16)
        lines += ["            else:"] if others else []
        return [*lines, *call(left, list(usual), 16 if others else 12)]

    def read_later(self) -> list[fx.Node]:
        """What is made before the loop over the layers, and read in each of them or after it."""
        before = {*self.root.before, *self.root.local}
        return [value.node for value in self.root.carried if value.node in before]

    def keep(self, node: fx.Node) -> str:
        """Give a value a name that the loop does not use."""
        scope, old = self.body, self.body.names[node]
        new = unique(node.name if node.name != old else "first", scope.names.values())
        del scope._bound[old]
        scope._bound[new], scope.names[node] = node, new
        return f"        {new} = {old}"

    def before_layers(self) -> list[str]:
        """Statements up to the layers; what embeds the tokens is a method."""
        scope, embedding = self.body, self.embedding
        nodes = [n for n in self.root.before if n not in self.root.local]
        if embedding is None:
            wide = "        input_ids = input_ids.long()  # what the model computes with"
            return [wide, *statements(scope, nodes, 8)]
        name = scope.bind(embedding, "hidden_states")
        at = nodes.index(embedding)
        return [
            *statements(scope, nodes[:at], 8),
            "        if inputs_embeds is not None:",
            f"            {name} = inputs_embeds",
            "        else:",
            f"            {name} = self.embed_input_ids(input_ids)",
            *statements(scope, nodes[at + 1 :], 8),
        ]


def _sequence(name: str, values: list[str]) -> list[str]:
    """`name = (A, B) * 15`, or the values in full."""
    for period in range(1, len(values) // 2 + 1):
        if len(values) % period == 0 and values == values[:period] * (len(values) // period):
            unit = ", ".join(values[:period])
            return [
                f"        {name} = ({unit}{',' if period == 1 else ''}) * {len(values) // period}"
            ]
    return [f"        {name} = (", *(f"            {v}," for v in values), "        )"]


def _statement_end(lines: list[str], at: int) -> int:
    """The line after a statement that may go over several."""
    depth = 0
    for i in range(at, len(lines)):
        depth += lines[i].count("(") - lines[i].count(")")
        if depth <= 0:
            return i + 1
    return len(lines)
