"""What the class of a model that pools has in the place of `compute_logits`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from compiler import layers
from compiler.emit.text import quoted
from funcmodels.errors import LoweringError
from funcmodels.spec import POOLING_TASKS, Model

if TYPE_CHECKING:
    from compiler.emit.scope import Module, Scope
    from compiler.ir import Program


def class_lines(program: Program) -> list[str]:
    """The attributes that vLLM decides by how to run the class."""
    assert program.model.pooling is not None
    return [
        "    is_pooling_model = True",
        f"    default_seq_pooling_type = {quoted(program.model.pooling.upper())}",
        f"    attn_type = {quoted(_attention_type(program))}",
    ]


def task_check(module: Module, program: Program) -> str:
    """The line that refuses an engine of another task."""
    if program.model.task not in POOLING_TASKS:
        return f"{module.help('check_generates')}(vllm_config)"
    assert program.model.pooling is not None
    asked = f"{quoted(program.model.pooling.upper())}, {quoted(_attention_type(program))}"
    return f"{module.help('check_pools')}(vllm_config, {asked})"


def constructor_lines(module: Module, model: Model) -> list[str]:
    """The pooler: what makes a vector of each sequence, in float32."""
    assert model.pooling is not None
    heads = {"embed": "EmbeddingPoolerHead", "classify": "ClassifierPoolerHead"}
    last = {"embed": "PoolerNormalize", "classify": "PoolerClassify"}
    activation = f"{module.use(last[model.task])}()" if model.normalize else "None"
    for name in ("DispatchPooler", "SequencePooler", "get_seq_pooling_method"):
        module.use(name)
    return [
        "        self.pooler = DispatchPooler(",
        "            {",
        f"                {quoted(model.task)}: SequencePooler(",
        f"                    pooling=get_seq_pooling_method({quoted(model.pooling.upper())}),",
        f"                    head={module.use(heads[model.task])}(",
        f"                        head_dtype=torch.float32, activation={activation}",
        "                    ),",
        "                )",
        "            }",
        "        )",
    ]


def check_encoder(scope: Scope, node: fx.Node) -> None:
    """Refuse attention to later tokens where there are none yet, or where the engine has no kernel.

    Raises:
        LoweringError: with the user's line.
    """
    if scope.module.task not in POOLING_TASKS:
        raise LoweringError(
            "attention that is not causal cannot be served with a KV cache",
            need="causal=True in a model that generates text",
            from_=node.meta["where"],
            fix='ops.attention(..., causal=True), or fm.Model(..., task="embed")',
        )
    if node.kwargs.get("softcap") is not None:
        raise LoweringError(
            "attention that is not causal has no softcap in vLLM on a CPU",
            got=f"softcap={node.kwargs['softcap']}",
            need="causal=True, or no softcap",
            from_=node.meta["where"],
            fix="leave softcap out",
        )


def _attention_type(program: Program) -> str:
    """ "encoder_only" where some token sees later ones: then no prompt may be cut into pieces."""
    for block in program.all():
        for node in block.graph.nodes:
            if node.target is layers.attention and not node.kwargs.get("causal", True):
                return "encoder_only"
    return "decoder"
