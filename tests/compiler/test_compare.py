"""fm.verify finds planted faults of passes, and names the pass and the user's line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

import compiler.passes
import funcmodels as fm
from compiler import layers
from compiler.compare import VerificationError
from compiler.emit import expressions
from compiler.ir import Program
from compiler.rewrite import copy_block
from funcmodels import ops
from funcmodels.errors import LoweringError, ShardingError
from funcmodels.models import llama
from tests.compiler import programs
from tests.compiler.programs import small
from tests.engine.custom import custom
from tests.tiny_llama import tiny, weights_of

PROMPTS = [[1, 5, 9, 2, 7, 3], [4]]


def line_of(function: Callable[..., Any], start: str) -> str:
    """The place of a line of a function's, as errors name it."""
    lines, first = inspect.getsourcelines(inspect.unwrap(function))
    [i] = [i for i, line in enumerate(lines) if line.strip().startswith(start)]
    return f"llama.py:{first + i} in {inspect.unwrap(function).__name__}"


def plant(
    monkeypatch: pytest.MonkeyPatch, after: str, fault: Callable[[fx.Node], None], target: Any
) -> None:
    """Let a pass do something wrong to every call of a layer."""

    def broken(run: Callable[[Program], Program]) -> Callable[[Program], Program]:
        def faulty(program: Program) -> Program:
            program = run(program)
            blocks = {name: copy_block(block) for name, block in program.blocks.items()}
            program = replace(program, root=copy_block(program.root), blocks=blocks)
            for block in program.all():
                for node in block.graph.nodes:
                    if node.op == "call_function" and node.target is target:
                        fault(node)
            return program

        faulty.__name__ = run.__name__
        return faulty

    names = [run.__name__ for run in compiler.passes.PIPELINE]
    assert after in names
    changed = tuple(broken(r) if r.__name__ == after else r for r in compiler.passes.PIPELINE)
    monkeypatch.setattr(compiler.passes, "PIPELINE", changed)


def swap_gate_and_up(node: fx.Node) -> None:
    if node.kwargs["kind"] == "merged_column":
        node.args = (node.args[0], tuple(reversed(node.args[1])), *node.args[2:])  # type: ignore[arg-type]


def drop_the_sum(node: fx.Node) -> None:
    (weight, *_) = node.args[1]  # type: ignore[misc]
    if node.kwargs["kind"] == "row" and weight.target == "down":  # type: ignore[union-attr]
        node.kwargs = {**node.kwargs, "kind": "row_partial"}


def scale_twice(node: fx.Node) -> None:
    node.kwargs = {**node.kwargs, "scale": 1.0}


def other_angles(node: fx.Node) -> None:
    node.kwargs = {**node.kwargs, "theta": 77.0}


def other_eps(node: fx.Node) -> None:
    node.kwargs = {**node.kwargs, "eps": 0.5}


ATTENTION, MLP, LAYER = llama.attention, llama.mlp, llama.decoder_layer
FAULTS = {
    "gate and up": ("fuse_gate_up", swap_gate_and_up, layers.linear, MLP, "down ="),
    "no sum": ("lower_linear", drop_the_sum, layers.linear, MLP, "down ="),
    "scale": ("flatten_heads", scale_twice, layers.attention, ATTENTION, "o ="),
    "angles": ("flatten_heads", other_angles, layers.rotary, ATTENTION, "q, k = ops.rope("),
}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_llama_is_what_its_function_is(tp):
    model = tiny(vocab_size=64)
    found = fm.verify(model, weights_of(model, dtype=torch.float64), PROMPTS, tp=tp)
    assert found.difference < 1e-6
    assert {"trace", "partition", "fuse_qkv", "keep_operands"} <= set(found.steps)


def test_so_is_a_model_with_everything():
    model = custom(local_window=4, has_sinks=True, has_qk_norm=True, has_gains=True, softcap=20.0)
    weights = fm.init(model, seed=0, dtype=torch.float64)
    assert fm.verify(model, weights, PROMPTS, tp=2).difference < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", list(FAULTS))
def test_a_planted_fault_is_found(kind, dtype, monkeypatch):
    after, fault, target, function, start = FAULTS[kind]
    model = tiny(vocab_size=64)
    weights = weights_of(model, dtype=dtype)
    fm.verify(model, weights, PROMPTS, tp=2)
    plant(monkeypatch, after, fault, target)
    with pytest.raises(VerificationError, match=f"after {after}, FmLlamaForCausalLM") as error:
        fm.verify(model, weights, PROMPTS, tp=2)
    assert str(error.value.lines["from"]) == line_of(function, start)


def test_ranks_that_disagree_are_named(monkeypatch):
    model = tiny(vocab_size=64)
    plant(monkeypatch, "lower_linear", drop_the_sum, layers.linear)
    with pytest.raises(VerificationError, match="differs between ranks"):
        fm.verify(model, weights_of(model), PROMPTS, tp=2)
    fm.verify(model, weights_of(model), PROMPTS, tp=1)  # one rank has the whole sum


def test_a_fused_norm(monkeypatch):
    model = tiny(vocab_size=64)
    plant(monkeypatch, "fuse_add_rms_norm", other_eps, layers.add_rms_norm)
    with pytest.raises(VerificationError, match="after fuse_add_rms_norm") as error:
        fm.verify(model, weights_of(model), PROMPTS)
    assert "in decoder_layer" in str(error.value.lines["from"])


@pytest.mark.parametrize("tp", [2, 4])
def test_a_vocabulary_is_padded_as_the_engine_does(tp):
    model = tiny()
    assert model.by_path["embed"].shape[0] == 97
    found = fm.verify(model, weights_of(model, dtype=torch.float64), PROMPTS, tp=tp)
    assert found.difference < 1e-6
    tied = tiny(tie_word_embeddings=True)
    assert fm.verify(tied, weights_of(tied), PROMPTS, tp=tp).difference < 1e-3


def test_ranks_that_do_not_divide():
    model = tiny()
    with pytest.raises(ShardingError, match=r"cannot split axis"):
        fm.verify(model, weights_of(model), PROMPTS, tp=3)


def served_as(body: Callable[..., Any]) -> fm.Model:
    def forward(params, tokens, positions, segment_ids=None):
        return ops.unembed(body(ops.embed(tokens, params["embed"]), tokens), params["head"])

    return small(forward)


def test_a_function_that_changes_is_not_the_compilers_fault():
    calls: list[int] = []

    def body(x, tokens):
        calls.append(1)
        return x * len(calls)

    model = served_as(body)
    match = "does something else for 6 tokens than when it was recorded"
    with pytest.raises(VerificationError, match=match) as error:
        fm.verify(model, programs.weights_of(model), PROMPTS)
    assert "test_compare.py" in str(error.value.lines["from"])
    assert "globals that change" in error.value.lines["fix"]


def test_what_cannot_be_served_is_refused(monkeypatch):
    """Emission refuses it, and so does the comparison, which would not need the text."""
    monkeypatch.setitem(expressions._SPECIAL, torch.neg, lambda scope, node: "f(a=1, a=2)")
    model = served_as(lambda x, tokens: -x)
    with pytest.raises(LoweringError, match="is not Python"):
        fm.verify(model, programs.weights_of(model), PROMPTS)
