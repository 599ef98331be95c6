"""The verifier names each breach of the representation's rules that is planted here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compiler.ir import Program, TensorType
from compiler.partition import partition
from compiler.passes import PIPELINE, run_passes
from compiler.rewrite import copy_block
from compiler.trace import trace
from compiler.verify import verify
from funcmodels.errors import VerifyError
from tests.tiny_llama import tiny


@pytest.fixture
def program() -> Program:
    """A program of its own to break."""
    traced = trace(tiny())
    blocks = {name: copy_block(block) for name, block in traced.blocks.items()}
    return replace(traced, root=copy_block(traced.root), blocks=blocks)


def breach(program: Program, match: str) -> None:
    with pytest.raises((VerifyError, RuntimeError), match=match):
        verify(program)


def test_sound_programs_pass(program):
    verify(program)
    verify(partition(program))
    verify(run_passes(partition(program)))


def test_missing_type(program):
    node = next(n for n in program.root.graph.nodes if n.op == "call_function")
    del node.meta["type"]
    breach(program, f"forward.{node.name}: a node has no type or no source line")


def test_missing_line(program):
    node = next(n for n in program.blocks["mlp"].graph.nodes if n.op == "call_function")
    del node.meta["where"]
    breach(program, f"mlp.{node.name}: a node has no type or no source line")


def test_no_tensor_type(program):
    node = next(n for n in program.root.graph.nodes if n.op == "call_function")
    node.meta["type"] = "float32"
    breach(program, "'float32' is no tensor type")


def test_unknown_operation(program):
    graph = program.root.graph
    with graph.inserting_before(program.root.output):
        node = graph.call_method("relu", (program.root.results[0],))
    node.meta.update(program.root.results[0].meta)
    breach(program, "call_method is no operation")


def test_unknown_parameter(program):
    node = next(n for n in program.root.graph.nodes if n.op == "get_attr")
    node.target = "nowhere"
    breach(program, "nowhere is no parameter of the block")


def test_unknown_block(program):
    program.root.calls[0].target = "nowhere"
    breach(program, "calls nowhere, which is no block")


def test_missing_argument(program):
    call = program.root.calls[0]
    call.args = call.args[:-1]
    breach(program, r"gives 1 arguments to decoder_layer\(2\)")


def test_missing_binding(program):
    del program.root.calls[0].meta["binding"]["input_norm"]
    breach(program, "binds .* but decoder_layer has")


def test_binding_to_no_parameter(program):
    program.root.calls[0].meta["binding"]["input_norm"] = "nowhere"
    breach(program, "binds input_norm to nowhere, which is no parameter here")


def test_binding_of_another_shape(program):
    program.root.calls[0].meta["binding"]["input_norm"] = "embed"
    breach(program, "binds input_norm to embed of another shape")


def test_use_before_definition(program):
    block = program.blocks["mlp"]
    first = next(n for n in block.graph.nodes if n.op == "call_function")
    last = block.results[0]
    first.prepend(last)
    breach(program, "before it has been defined")


def test_returns_nothing(program):
    block = program.blocks["mlp"]
    block.graph.erase_node(block.output)
    block.graph.output(())
    breach(program, "mlp returns nothing")


def test_argument_of_another_type(program):
    call = program.root.calls[0]
    x = call.all_input_nodes[0]
    x.meta["type"] = TensorType(torch.float32, x.meta["type"].shape)
    breach(program, "gives .* to x, which is")


def test_result_of_another_type(program):
    call = program.root.calls[0]
    call.meta["type"] = TensorType(torch.float32, call.meta["type"].shape)
    breach(program, "is .* but decoder_layer returns")


def test_blocks_that_call_each_other(program):
    block = program.blocks["mlp"]
    call = next(n for n in program.blocks["decoder_layer"].calls if n.target == "mlp")
    with block.graph.inserting_before(block.output):
        again = block.graph.create_node("call_module", "mlp", (block.inputs[0],))
    again.meta.update(call.meta, binding={name: name for name in block.params})
    breach(program, "mlp is called before it is defined|calls itself")


def test_placement_missing_after_partitioning(program):
    local = partition(program)
    node = next(n for n in local.root.graph.nodes if n.op == "call_function")
    del node.meta["placement"]
    breach(local, "has no placement")


def test_every_pass_is_verified(monkeypatch):
    """A pass that breaks a program is caught at once, not by the emitter."""

    def broken(program: Program) -> Program:
        program.root.calls[0].target = "nowhere"
        return program

    monkeypatch.setattr("compiler.passes.PIPELINE", (*PIPELINE[:3], broken, *PIPELINE[3:]))
    with pytest.raises(VerifyError, match="calls nowhere"):
        run_passes(partition(trace(tiny())))
