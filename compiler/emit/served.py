"""The class that vLLM loads: checks, the body and its head, logits or a pooler, loading."""

from __future__ import annotations

import re
from typing import Any

from compiler import layers
from compiler.emit import pooling
from compiler.emit.block import constructor, statements
from compiler.emit.loading import load_lines, mapper_lines
from compiler.emit.recurrence import state_lines
from compiler.emit.text import call, quoted, table
from compiler.emit.whole import DYNAMIC, Whole
from compiler.ir import MODEL_DTYPE, tensor_type
from compiler.loading import apply
from compiler.needs import served_needs, strongest
from compiler.stages import why_one_stage
from funcmodels import __version__
from funcmodels.spec import POOLING_TASKS


class ServedLines(Whole):
    """Writes it."""

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
            *mapper_lines(self.loading, m),
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
            f"        {m.help('warn_int8')}(self)",
            "",
            "    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:",
            *self.embed_call(),
            "",
            "    def forward(",
            "        self,",
            "        input_ids: torch.Tensor | None,",
            "        positions: torch.Tensor,",
            "        intermediate_tensors: IntermediateTensors | None = None,",
            "        inputs_embeds: torch.Tensor | None = None,",
            "    ) -> torch.Tensor | IntermediateTensors:",
            *call(f"return self.{inner}", ["input_ids", "positions", *DYNAMIC[2:]], 8),
            "",
            *logits,
            *load_lines(self.loading, m),
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
        """That the engine hands over embeddings in the table's dtype, or none."""
        if self.embedding is None:
            return [f"        {self.module.help('check_tokens_given')}(vllm_config)"]
        dtype = tensor_type(self.embedding).dtype
        if dtype == MODEL_DTYPE:
            return []
        self.module.use("torch")
        return [f"        {self.module.help('check_embeds')}(vllm_config, {dtype})"]

    def embed_call(self) -> list[str]:
        """What the engine is answered that asks for embeddings of tokens."""
        if self.embedding is None:
            return [
                '        raise NotImplementedError("this model reads tokens, not embeddings alone")'
            ]
        return [f"        return self.{self.plan.inner}.embed_input_ids(input_ids)"]

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
        """Where a linear layer's name has no dot, as `score`, or is of several layers."""
        bare = [name for name in self.loading.lora_targets if "." not in name]
        tensors = [
            t for name in bare for t in (name, f"{name}.weight") if t in self.loading.tensors
        ]
        found = [apply(self.loading, t)[0].removesuffix(".weight") for t in tensors]
        is_whole = all(is_one for _, _, _, is_one, _ in self.loading.shared.values())
        if is_whole and all(name.rpartition(".")[2] in self.vocabularies() for name in found):
            return []
        name = self.module.help("name_ignored")
        return [f"        {name}(vllm_config, self.hf_to_vllm_mapper, TENSORS)"]

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
            (embedding,) = self.tied_embeddings()
            table = f"self.{self.plan.inner}.{self.body.placed.layers[embedding]}"
            tie = f"self.lm_head.tie_weights({table})"
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
