"""The passes that lower a partitioned program to vLLM's layers, in their order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from compiler import collectives, layers
from compiler.ir import Program
from compiler.passes.cancel_casts import cancel_casts
from compiler.passes.cancel_reshapes import cancel_reshapes
from compiler.passes.cut_parameters import cut_parameters
from compiler.passes.drop_gradients import drop_gradients
from compiler.passes.drop_step_gradients import drop_step_gradients
from compiler.passes.flatten_heads import flatten_heads
from compiler.passes.fuse_add_rms_norm import fuse_add_rms_norm
from compiler.passes.fuse_bias import fuse_bias
from compiler.passes.fuse_gate_up import fuse_gate_up
from compiler.passes.fuse_qkv import fuse_qkv
from compiler.passes.keep_operands import keep_operands
from compiler.passes.lower_experts import lower_experts
from compiler.passes.lower_latent_attention import lower_latent_attention
from compiler.passes.lower_linear import lower_linear
from compiler.passes.lower_vocab import lower_vocab
from compiler.passes.merge_parts import merge_parts
from compiler.passes.silu_and_mul import silu_and_mul
from compiler.recurrence import recurrence
from compiler.rewrite import ProgramPass, on_blocks
from compiler.rules import vocab_embed
from compiler.rules.mixture import experts_of_rank
from compiler.verify import verify
from funcmodels import ops

PIPELINE: tuple[ProgramPass, ...] = (
    on_blocks(drop_gradients, torch.detach, *collectives.ALL),
    on_blocks(cut_parameters, collectives.take_block),
    on_blocks(drop_step_gradients, recurrence),
    on_blocks(cancel_casts, Tensor.to),
    on_blocks(lower_linear, torch.einsum, torch.matmul, F.linear),
    on_blocks(lower_experts, ops.experts, experts_of_rank),
    on_blocks(lower_latent_attention, ops.latent_attention),
    on_blocks(fuse_bias, layers.linear),
    on_blocks(silu_and_mul, torch.mul),
    on_blocks(fuse_gate_up, ops.swiglu, ops.geglu),
    on_blocks(fuse_qkv, ops.attention),
    on_blocks(merge_parts, layers.linear),
    on_blocks(flatten_heads, ops.rope, ops.attention),
    on_blocks(cancel_reshapes, torch.reshape),
    on_blocks(lower_vocab, vocab_embed, ops.unembed),
    fuse_add_rms_norm,
    keep_operands,
)


def run_passes(program: Program) -> Program:
    """The program after every pass, verified between them."""
    for _, after in passes(program):
        program = after
    return program


def passes(program: Program) -> Iterator[tuple[str, Program]]:
    """The program after each pass, verified, with the pass's name."""
    for run in PIPELINE:
        before, program = program, run(program)
        verify(program, since=before)
        yield getattr(run, "__name__", repr(run)), program
