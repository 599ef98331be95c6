"""What the writers of the emitted classes share: the program in its parts, and the file."""

from __future__ import annotations

import re
from collections import Counter

from torch import fx

from compiler.emit.scope import Module, Scope
from compiler.loading import loading_of
from compiler.modules import plan_modules
from compiler.names import unique
from compiler.needs import Exact, served_needs
from compiler.partition import Partitioned
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
        self.body.preferred[result] = "hidden_states"
        taken = {self.module.class_name(name) for name in plan.blocks} | {self.model.name}
        base = self.module.prefix
        self.body_class = unique(
            f"{base}Model" if f"{base}Model" not in taken else f"{base}Body", taken
        )

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
