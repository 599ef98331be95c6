"""What the writers of the emitted classes share: the program in its parts, and the file."""

from __future__ import annotations

import operator
import re
from collections import Counter

from torch import fx

from compiler import layers
from compiler.emit.scope import Module, Scope
from compiler.ir import tensor_type
from compiler.loading import loading_of
from compiler.modules import plan_modules
from compiler.names import unique
from compiler.needs import Exact, served_needs
from compiler.partition import Partitioned
from compiler.rewrite import is_call, is_param
from compiler.split import split_at_unembedding
from compiler.stages import root_of, why_one_stage
from funcmodels.config_json import config_of_fields
from funcmodels.errors import LoweringError
from funcmodels.spec import Model

# The arguments of `forward` whose length is the number of tokens.
DYNAMIC = ("input_ids", "positions", "intermediate_tensors", "inputs_embeds")


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


class Whole:
    """A program in its parts, and the file that is being written of it."""

    def __init__(self, program: Partitioned) -> None:
        self.program = program
        self.model = program.model
        self.split = split = split_at_unembedding(program)
        self.plan = plan = plan_modules(program, split)
        self.loading = loading_of(plan, program.model)
        self.module = module_of(program)
        self.body = Scope(self.module, split.body, plan.blocks["forward"])
        self.head = Scope(self.module, split.head, plan.blocks["compute_logits"])
        self.root = root_of(split.body, self.body.placed)
        (result,) = split.body.results
        for node in split.body.graph.nodes:
            if is_call(node, operator.getitem) and node.args[0].op == "call_module":
                self.body.preferred[node] = self._name_of_part(node)
        self.body.preferred[result] = "hidden_states"
        taken = {self.module.class_name(name) for name in plan.blocks} | {self.model.name}
        base = self.module.prefix
        self.body_class = unique(
            f"{base}Model" if f"{base}Model" not in taken else f"{base}Body", taken
        )

    def _name_of_part(self, part: fx.Node) -> str:
        """What a block calls one of its results, where its caller calls it nothing."""
        while part.name.startswith("getitem") and part.args[0].op == "call_module":  # type: ignore[union-attr]
            call, i = part.args
            part = self.program.blocks[str(call.target)].results[i]  # type: ignore[union-attr,index]
        return re.sub(r"_\d+$", "", part.name)

    @property
    def staged(self) -> bool:
        """Whether the model can be cut into pipeline stages."""
        return why_one_stage(self.split.body, self.root) is None

    @property
    def embedding(self) -> fx.Node | None:
        """What embeds the tokens, where nothing else reads them.

        A prompt may then be given as embeddings; other models the engine must give tokens.
        """
        tokens, _ = self.split.body.inputs
        users = list(tokens.users)
        if not users:
            raise LoweringError(
                "forward does not read the tokens",
                need="x = ops.embed(tokens, params[...])",
                fix="compute the logits from them",
            )
        return users[0] if len(users) == 1 and _embeds(users[0], tokens) else None

    def tied_embeddings(self) -> list[fx.Node]:
        """The layer of the body whose table the unembedding takes, if it takes one."""
        if not self.plan.tied:
            return []
        shared = self.split.head.params.keys() & self.split.body.params.keys()
        found = self.body.placed.layers
        tables = [n for n in found if n.target is layers.vocab_embedding]
        return [n for n in tables if str(n.args[1].target) in shared]  # type: ignore[union-attr]


def _embeds(node: fx.Node, tokens: fx.Node) -> bool:
    """Whether a node looks tokens up in a parameter."""
    if node.op != "call_function" or not tensor_type(node).dtype.is_floating_point:
        return False
    return {*node.all_input_nodes} - {tokens} == {n for n in node.all_input_nodes if is_param(n)}


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
