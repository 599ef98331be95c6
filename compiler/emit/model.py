"""A whole program -> a file: constants, a class a block, the model, and the class vLLM loads."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import fx

from compiler import layers
from compiler.emit import pooling
from compiler.emit.block import (
    constructor,
    emit_block,
    method_lines,
    parents,
    statements,
    symbol_lines,
)
from compiler.emit.helpers import helpers
from compiler.emit.recurrence import state_lines
from compiler.emit.scope import IMPORTS, Module, Scope
from compiler.emit.text import WIDTH, call, literal, quoted, table, wrapped
from compiler.ir import MODEL_DTYPE, tensor_type
from compiler.loading import Loading, apply, loading_of
from compiler.modules import Plan, plan_modules
from compiler.names import unique
from compiler.needs import Exact, served_needs, strongest
from compiler.partition import Partitioned
from compiler.roll import Loop
from compiler.split import Split, split_at_unembedding
from compiler.stages import root_of, why_one_stage
from funcmodels import __version__
from funcmodels.config_json import config_of_fields
from funcmodels.errors import LoweringError
from funcmodels.models.hf_config import INERT
from funcmodels.spec import POOLING_TASKS, Model

# Fields of config.json that decide what a model computes, where a model has them.
_STRUCTURE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps", "hidden_act", "rope_theta",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "layer_types",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
# Fields of a config that a folder may have otherwise: it may be made for longer sequences.
_MAY_DIFFER = {*INERT, "max_position_embeddings", "original_max_position_embeddings"}


def emit_model(program: Partitioned) -> str:
    """The source of a lowered program's vLLM class, as a file that stands alone."""
    split = split_at_unembedding(program)
    plan = plan_modules(program, split)
    return _Writer(program, split, plan, loading_of(plan, program.model)).file()


def module_of(program: Partitioned) -> Module:
    """An empty file for a program: what its classes' names begin with, and its axes' constants."""
    name = program.model.name
    base = re.sub(r"(ForCausalLM|LMHeadModel|Model)$", "", name) or name
    return Module(
        base,
        _axes(program.model),
        Exact(served_needs(program)),
        program.model.task,
        config_of_fields(program.model).get("kv_lora_rank") is not None,
    )


class _Writer:
    def __init__(self, program: Partitioned, split: Split, plan: Plan, loading: Loading) -> None:
        self.program = program
        self.model = program.model
        self.split = split
        self.plan = plan
        self.loading = loading
        self.module = module_of(program)
        self.body = Scope(self.module, split.body, plan.blocks["forward"])
        self.head = Scope(self.module, split.head, plan.blocks["compute_logits"])
        self.root = root_of(split.body, self.body.placed)
        (result,) = split.body.results
        self.body.preferred[result] = "hidden_states"
        taken = {self.module.class_name(name) for name in plan.blocks} | {self.model.name}
        base = self.module.prefix
        self.body_class = unique(
            f"{base}Model" if f"{base}Model" not in taken else f"{base}Body", taken
        )

    def file(self) -> str:
        blocks = [
            emit_block(self.module, block, self.plan.blocks[name])
            for name, block in self.program.blocks.items()
            if name in self.plan.blocks
        ]
        body, served = self.model_class(), self.served_class()
        tensors = self.loading.tensor_lines(self.module)
        first, last = self.helpers()
        header = [
            *self.docstring(),
            "",
            *self.imports(),
            "",
            *(f"{name} = {size}" for name, size in self.module.constants.items()),
            "",
            "# The config.json that this file was compiled for, as far as it decides the values.",
            *table("COMPILED_FOR", self.compiled_for()),
            "",
            *tensors,
        ]
        written = [[new for x in part for new in wrapped(x)] for part in (*blocks, body, served)]
        parts = [*written[:-1], *first, written[-1], *last]
        lines = [new for line in header for new in wrapped(line)]
        return "\n".join([*lines, *(x for part in parts for x in ["", "", *part])]) + "\n"

    def docstring(self) -> list[str]:
        function = inspect.unwrap(getattr(self.model.forward, "func", self.model.forward))
        file = inspect.getsourcefile(function) or "?"
        written = f"written by funcmodels {__version__} from {file.rsplit('/', 1)[-1]}"
        return [
            f'"""{self.model.name} for vLLM: {written}, do not edit.',
            "",
            f"{self.model.num_parameters:,} parameters. Needs torch and vLLM, and not funcmodels.",
            '"""',
        ]

    def compiled_for(self) -> dict[str, str]:
        config = config_of_fields(self.model)
        own = self.own_fields(config)
        found = {k: config[k] for k in _STRUCTURE if config.get(k) is not None}
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        rope |= {k: own.pop(k) for k in ("rope_theta", "partial_rotary_factor") if k in own}
        found |= {k: v for k, v in own.items() if k not in found}
        found |= {k: rope.pop(k) for k in ("rope_theta",) if k in rope}
        if rope or "rope_theta" in found:
            rope_type = rope.pop("type", "default")
            rope = {k: v for k, v in rope.items() if v is not None}
            found["rope_parameters"] = {"rope_type": rope_type, **rope}
        return {quoted(k): literal(v) for k, v in found.items()}

    def own_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the model's own config, where it describes a config.json of others.

        One that reads them has their defaults for what such a file leaves out.
        """
        own = self.model.config
        if self.model.hf_config is None or not dataclasses.is_dataclass(own):
            return {}
        values = {f.name: getattr(own, f.name) for f in dataclasses.fields(own)}
        return {
            name: value
            for name, value in values.items()
            if isinstance(value, (bool, int, float, str))
            and name not in _MAY_DIFFER
            and (name in config or hasattr(own, "from_hf"))
        }

    def imports(self) -> list[str]:
        by_source: dict[str, set[str]] = {}
        for name in self.module.used:
            by_source.setdefault(IMPORTS[name], set()).add(name)
        plain: list[list[str]] = [[], []]  # `import x` stands before `from x import y`
        names_from: list[list[str]] = [[], []]  # each for the standard library, and for others
        for source in sorted(by_source):
            names = sorted(by_source[source])
            others = source not in ("import", "collections.abc", "itertools", "math", "typing")
            if source == "import":
                plain[0] += [f"import {name}" for name in names]
            elif source == "":
                plain[1].append("import torch")
            elif "F" in names:
                plain[1].append("import torch.nn.functional as F")
            else:
                names_from[others] += _from(source, names)
        groups = [p + f for p, f in zip(plain, names_from, strict=True) if p or f]
        return [line for group in groups for line in ["", *group]][1:]

    def helpers(self) -> tuple[list[list[str]], list[list[str]]]:
        """The source of the runtime functions that the file uses: before its last class, after."""
        first = self.loading.helpers
        rest = sorted(self.module.helpers - set(first))
        before, after = ([list(helpers()[name].lines) for name in part] for part in (first, rest))
        return before, after

    # The model without its head

    def model_class(self) -> list[str]:
        m = self.module
        for name in ("torch", "nn", "VllmConfig", "support_torch_compile", "IntermediateTensors"):
            m.use(name)
        forward = self.body_forward()
        return [
            "@support_torch_compile(",
            "    dynamic_arg_dims={",
            *(f'        "{n}": {{0: "num_tokens"}},' for n in _DYNAMIC),
            "    },",
            ")",
            f"class {self.body_class}(nn.Module):",
            '    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:',
            "        super().__init__()",
            *self.body_constructor(),
            "",
            "    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:",
            *self.embed_lines(),
            "",
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

    @property
    def staged(self) -> bool:
        """Whether the model can be cut into pipeline stages."""
        return why_one_stage(self.split.body, self.root) is None

    def embedding(self) -> fx.Node:
        """The one operation that reads the tokens."""
        tokens, _ = self.split.body.inputs
        users = list(tokens.users)
        if len(users) != 1 or users[0].op != "call_function":
            raise LoweringError(
                "forward reads the tokens in other ways than one embedding",
                got=f"{len(users)} uses",
                need="x = ops.embed(tokens, params[...]), and nothing else of tokens",
                from_=users[0].meta["where"] if users else None,
                fix="embed once, and compute everything from x",
            )
        return users[0]

    def embed_lines(self) -> list[str]:
        tokens, _ = self.split.body.inputs
        scope = Scope(self.module, self.split.body, self.body.placed)
        scope.names[tokens] = "input_ids"
        node = self.embedding()
        lines = statements(scope, [node], 8)
        return [line.replace(f"{scope.names[node]} = ", "return ", 1) for line in lines]

    def body_constructor(self) -> list[str]:
        loop = self.root.loop
        lines = constructor(self.body)
        if self.staged:
            lines = self.by_stage(lines)
        for container in self.containers():
            lines += parents(container, lines)
            lines += self.make_layers(container, loop)
        return lines

    def by_stage(self, lines: list[str]) -> list[str]:
        """Put what is before the loop on the first stage, and what is after it on the last."""
        self.module.use("get_pp_group")
        self.module.use("PPMissingLayer")
        placed = self.body.placed
        first = {a for n, a in placed.layers.items() if n in set(self.root.before)}
        last = {a for n, a in placed.layers.items() if n in set(self.root.after)}
        embedding = placed.layers.get(self.embedding())
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
            if name in last or (name == embedding and self.plan.tied):
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

    def make_layers(self, container: str, loop: Loop | None) -> list[str]:
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
        if self.staged and loop is not None and container == loop.container:
            m.use("make_layers")
            names = [quoted(n) for n in self.carried()]
            sizes = {t.meta["type"].shape[-1] for t in loop.results}
            assert len(sizes) == 1
            hidden = self.hidden(next(iter(sizes)))
            dtypes = [tensor_type(t).dtype for t in loop.results]
            if {*dtypes} == {MODEL_DTYPE}:
                factory = m.use("make_empty_intermediate_tensors_factory")
                kept = f"[{', '.join(names)}]"
            else:
                m.use("torch")
                factory = m.help("empty_of")
                own = ("None" if d == MODEL_DTYPE else str(d) for d in dtypes)
                kept = "{" + ", ".join(map("{}: {}".format, names, own)) + "}"
            return [
                *kinds,
                *call(
                    f"self.start_layer, self.end_layer, self.{container} = make_layers",
                    [count, make.replace("'", '"') if kinds else make, prefix],
                    8,
                ),
                *call(
                    f"self.make_empty_intermediate_tensors = {factory}",
                    [kept, hidden],
                    8,
                ),
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

    def hidden(self, size: int) -> str:
        return self.module.size("hidden", size)

    def carried(self) -> list[str]:
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
        embedding = self.embedding()
        name = scope.bind(embedding, "hidden_states")
        embed = [
            "if inputs_embeds is not None:",
            f"    {name} = inputs_embeds",
            "else:",
            f"    {name} = self.embed_input_ids(input_ids)",
        ]
        before = self.around(root.before, embedding, embed)
        (result,) = self.split.body.results
        if root.loop is None:
            return [*symbol_lines(scope), *before, f"        return {scope.value(result)}"]
        loop, names = root.loop, self.carried()
        values = ["None" if i is None else scope.value(i) for i in loop.initial]
        changed = [(n, v) for n, v in zip(names, values, strict=True) if n != v]
        # At once: one of the values may be what another's name has held so far.
        starts = [self.keep(node) for node in self.read_later() if scope.names.get(node) in names]
        if changed:
            left, right = (", ".join(side) for side in zip(*changed, strict=True))
            starts.append(f"        {left} = {right}")
        for node, carried in zip(loop.results, names, strict=True):
            scope.bind(node, carried)
        over = f"self.{loop.container}"
        if self.staged:
            over = f"{self.module.use('islice')}({over}, self.start_layer, self.end_layer)"
        lines = [
            f"        for layer in {over}:",
            *self.call_layer(loop, names),
        ]
        after = statements(scope, root.after, 8)
        end = f"        return {scope.value(result)}"
        if not self.staged:
            return [*symbol_lines(scope), *before, *starts, *lines, *after, end]
        received = [f'            {n} = intermediate_tensors["{n}"]' for n in names]
        sent = ", ".join(f'"{n}": {n}' for n in names)
        return [
            *symbol_lines(scope),
            "        if get_pp_group().is_first_rank:",
            *(f"    {line}" for line in [*before, *starts]),
            "        else:",
            "            assert intermediate_tensors is not None",
            *received,
            *lines,
            "        if not get_pp_group().is_last_rank:",
            f"            return IntermediateTensors({{{sent}}})",
            *after,
            end,
        ]

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
        loop = self.root.loop
        assert loop is not None
        used = [n for node in self.root.after for n in node.all_input_nodes]
        used += loop.constants
        before = {n for n in self.root.before if n.op != "get_attr"}
        return [node for node in dict.fromkeys(used) if node in before]

    def keep(self, node: fx.Node) -> str:
        """Give a value a name that the loop does not use."""
        scope, old = self.body, self.body.names[node]
        new = unique(node.name if node.name != old else "first", scope.names.values())
        del scope._bound[old]
        scope._bound[new], scope.names[node] = node, new
        return f"        {new} = {old}"

    def around(self, nodes: list[fx.Node], embedding: fx.Node, embed: list[str]) -> list[str]:
        """Statements, with the embedding's own lines in its place."""
        at = nodes.index(embedding)
        before = statements(self.body, nodes[:at], 8)
        return [
            *before,
            *(f"        {e}" for e in embed),
            *statements(self.body, nodes[at + 1 :], 8),
        ]

    # The class that vLLM loads

    def served_class(self) -> list[str]:
        m, inner = self.module, self.plan.inner
        for name in (
            "maybe_prefix",
            "Iterable",
            "AutoWeightsLoader",
            "WeightsMapper",
            "SupportsLoRA",
        ):
            m.use(name)
        for name in ("check_config", "check_ranks", "check_registered", "tensors_to_await"):
            m.help(name)
        pools = self.model.task in POOLING_TASKS
        logits = [] if pools else self.compute_logits()  # which names what the constructor reads
        bases = ["nn.Module", m.help("AdaptersApart"), "SupportsLoRA", m.use("SupportsPP")]
        return [
            f"class {self.model.name}({', '.join(bases)}):",
            f'    compiled_by = "funcmodels {__version__}"',
            *self.loading.mapper_lines(m),
            *table("packed_modules_mapping", self.packed(), 4),
            *self.embedding_modules(),
            *(pooling.class_lines(self.program) if pools else []),
            *state_lines(m, self.program),
            "",
            '    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:',
            "        super().__init__()",
            "        check_config(vllm_config, COMPILED_FOR)",
            f"        {pooling.task_check(m, self.program)}",
            *self.check_ranks(),
            *self.check_stages(),
            *self.check_embeds(),
            f"        check_registered({self.model.name}, vllm_config)",
            *self.name_ignored(),
            "        self.config = vllm_config.model_config.hf_config",
            "        self.awaited = tensors_to_await(vllm_config, TENSORS)",
            *call(
                f"self.{inner} = {self.body_class}",
                ["vllm_config=vllm_config", f'prefix=maybe_prefix(prefix, "{inner}")'],
                8,
            ),
            *(pooling.constructor_lines(m, self.model) if pools else self.head_constructor()),
            *self.make_empty(),
            "",
            "    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:",
            f"        return self.{inner}.embed_input_ids(input_ids)",
            "",
            "    def forward(",
            "        self,",
            "        input_ids: torch.Tensor | None,",
            "        positions: torch.Tensor,",
            "        intermediate_tensors: IntermediateTensors | None = None,",
            "        inputs_embeds: torch.Tensor | None = None,",
            "    ) -> torch.Tensor | IntermediateTensors:",
            *call(f"return self.{inner}", ["input_ids", "positions", *_DYNAMIC[2:]], 8),
            "",
            *logits,
            *self.loading.load_lines(m),
        ]

    def compute_logits(self) -> list[str]:
        """The method of that name."""
        return [
            "    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:",
            *self.logits_lines(),
            "",
        ]

    def check_ranks(self) -> list[str]:
        """What the model's axes ask of the number of ranks."""
        rows = [
            f"({quoted(need.axis)}, {self.module.size(need.axis, need.units)}, {need.exact})"
            for need in strongest(served_needs(self.program))
        ]
        return call(self.module.help("check_ranks"), list(dict.fromkeys(rows)), 8) if rows else []

    def check_stages(self) -> list[str]:
        """Why the model is refused in several pipeline stages, if it is."""
        why = why_one_stage(self.split.body, self.root)
        if why is None:
            return []
        return call(self.module.help("check_one_stage"), ["vllm_config", quoted(why)], 8)

    def check_embeds(self) -> list[str]:
        """That the engine hands over no embeddings of another dtype than the table's."""
        dtype = tensor_type(self.embedding()).dtype
        if dtype == MODEL_DTYPE:
            return []
        self.module.use("torch")
        return [f"        {self.module.help('check_embeds')}(vllm_config, {dtype})"]

    def make_empty(self) -> list[str]:
        """What makes the tensors that a stage receives."""
        if not self.staged:
            return []
        arguments = ["vllm_config", f"self.{self.plan.inner}.make_empty_intermediate_tensors"]
        made = f"self.make_empty_intermediate_tensors = {self.module.help('made_in_time')}"
        return call(made, arguments, 8)

    def packed(self) -> dict[str, str]:
        """Fused module -> its parts, as quantisation and LoRA ask for them."""
        return {
            quoted(fused): f"[{', '.join(map(quoted, parts))}]"
            for fused, parts in self.plan.fused.items()
        }

    def embedding_modules(self) -> list[str]:
        rows = {quoted(name): f'"{kind}_embeddings"' for name, kind in self.vocabularies().items()}
        return table("embedding_modules", rows, 4) if rows else []

    def vocabularies(self) -> dict[str, str]:
        """The attributes that hold a table of the vocabulary: "input" or "output"."""
        embeds = [
            a for n, a in self.body.placed.layers.items() if n.target is layers.vocab_embedding
        ]
        heads = [a for n, a in self.head.placed.layers.items() if n.target is layers.logits]
        return {a.rpartition(".")[2]: "input" for a in embeds} | dict.fromkeys(heads, "output")

    def name_ignored(self) -> list[str]:
        """Where a checkpoint has a linear layer whose name has no dot, such as `score`."""
        bare = [name for name in self.loading.lora_targets if "." not in name]
        tensors = [
            t for name in bare for t in (name, f"{name}.weight") if t in self.loading.tensors
        ]
        found = [apply(self.loading, t)[0].removesuffix(".weight") for t in tensors]
        if all(name.rpartition(".")[2] in self.vocabularies() for name in found):
            return []
        name = self.module.help("name_ignored")
        return [f"        {name}(vllm_config, self.hf_to_vllm_mapper)"]

    def head_constructor(self) -> list[str]:
        m, scope = self.module, self.head
        logits = [n for n in scope.placed.layers if n.target is layers.logits]
        lines = [line.replace("{prefix}.", "") for line in constructor(scope)]
        lines = [
            re.sub(r'prefix=f"([\w.]+)"', r'prefix=maybe_prefix(prefix, "\1")', x) for x in lines
        ]
        if not logits:
            return lines
        vocab = scope.block.params[str(logits[0].args[1].target)]  # type: ignore[union-attr]
        size = m.size(vocab.axes[0], vocab.shape[0])
        made = [*lines, f"        self.logits_processor = {m.use('LogitsProcessor')}({size})"]
        x: Any = logits[0].args[0]
        if (dtype := tensor_type(x).dtype) != MODEL_DTYPE:  # else it would be rounded to that
            m.use("torch")
            made.append(f"        self.logits_processor.head_dtype = {dtype}")
        head = scope.placed.layers[logits[0]]
        if self.plan.tied:
            embedding = self.body.placed.layers[self.embedding()]
            tie = f"self.lm_head.tie_weights(self.{self.plan.inner}.{embedding})"
            made.insert(len(lines), f"        self.lm_head = {tie}")
        if not self.staged:
            return made
        m.use("get_pp_group")
        return [
            "        if get_pp_group().is_last_rank:",
            *(f"    {line}" for line in made),
            "        else:",
            f"            self.{head} = PPMissingLayer()",
        ]

    def logits_lines(self) -> list[str]:
        scope = self.head
        hidden = self.split.head.inputs[0]
        scope.bind(hidden, "hidden_states")
        nodes = [n for n in self.split.head.graph.nodes if n.op != "output"]
        lines = statements(scope, nodes, 8)
        (result,) = self.split.head.results
        last = lines[-1].strip()
        variable = scope.value(result)
        if len(lines) == 1 and last.startswith(f"{variable} = "):
            return [f"        return {last.removeprefix(f'{variable} = ')}"]
        out = []
        for node in nodes:
            if node.target is layers.logits:  # the engine gathers logits on some ranks only
                at = next(i for i, x in enumerate(lines) if "self.logits_processor" in x)
                guard = [f"        if {scope.names[node]} is None:", "            return None"]
                out = [*lines[: at + 1], *guard, *lines[at + 1 :]]
        return [*(out or lines), f"        return {variable}"]


_DYNAMIC = ("input_ids", "positions", "intermediate_tensors", "inputs_embeds")


def _axes(model: Model) -> dict[str, int]:
    """Axes that have one size throughout a model, and the number of its layers."""
    sizes: dict[str, set[int]] = {}
    lists: Counter[str] = Counter()
    for path, param in model.by_path.items():
        for axis, n in zip(param.axes, param.shape, strict=True):
            sizes.setdefault(axis, set()).add(n)
        head, *rest = path.split(".")
        if rest and rest[0].isdigit():
            lists[head] = max(lists[head], int(rest[0]) + 1)
    found = {axis: next(iter(ns)) for axis, ns in sizes.items() if len(ns) == 1}
    if len(lists) == 1 and "layers" not in found:
        found["layers"] = next(iter(lists.values()))
    return found


def _from(source: str, names: list[str]) -> list[str]:
    """`from source import names`, on as many lines as it takes."""
    one = f"from {source} import {', '.join(names)}"
    if len(one) <= WIDTH:
        return [one]
    return [f"from {source} import (", *(f"    {n}," for n in names), ")"]


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
