"""Sequence parallelism: the partitioned program, cut over tokens too, is the unpartitioned one."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import funcmodels as fm
from compiler import collectives
from compiler.partition import partition
from compiler.sequence import is_by_sequence
from compiler.trace import trace
from funcmodels import ops
from tests.compiler.programs import (
    HIDDEN,
    allowed,
    axes,
    check_on_ranks,
    inputs_of,
    small,
    weights_of,
)
from tests.compiler.random_programs import Spec, model_of, specs
from tests.tiny_llama import tiny

EXAMPLES = int(os.environ.get("FUNCMODELS_EXAMPLES", "12"))
P = axes()


@given(specs())
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 12,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
def test_random_programs(spec: Spec) -> None:
    model = model_of(spec)
    program = trace(model)
    local = partition(program, sequence=True)
    weights = fm.tree.map(lambda w: 0.6 * w, weights_of(model))
    tokens, positions = inputs_of(12, vocab=dict(spec.sizes)["vocab"])
    for parts in (2, 3, 4):
        if allowed(local, parts):
            check_on_ranks(program, local, parts, weights, tokens, positions, rtol=1e-8)


def test_a_layer_sends_two_scatters_and_two_gathers():
    local = partition(trace(tiny(vocab_size=96), batched=True), sequence=True)
    sent = [
        node.target
        for block in local.blocks.values()
        for node in block.graph.nodes
        if node.target in (collectives.all_reduce, collectives.all_gather)
        or node.target in (collectives.reduce_scatter, collectives.gather_vary)
    ]
    assert sent == [collectives.gather_vary, collectives.reduce_scatter] * 2
    layer = local.blocks["decoder_layer"]
    floating = [n for n in layer.graph.nodes if n.name in ("h", "x_1", "h_1", "add_1")]
    assert len(floating) == 4
    assert all(is_by_sequence(node.meta["placement"]) for node in floating)


@pytest.mark.parametrize("parts", [2, 4])
def test_what_does_not_work_token_by_token_has_all_tokens(parts: int):
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        x = x * torch.sigmoid(positions.to(x.dtype) / 7)[:, None]  # of every token's own
        x = x + torch.cumsum(x, 0) / 5 + x.mean(0)  # of the tokens before, and of all
        x = ops.rms_norm(x, params["norm"], eps=1e-6) @ params["square"]  # with a whole parameter
        return ops.unembed(x, params["head"])

    square = fm.axes(hidden=HIDDEN, out=HIDDEN)("hidden out")
    extra = {"norm": P("hidden", init="ones"), "square": square}
    model = small(forward, extra, {"vocab": "tp"})
    program = trace(model)
    local = partition(program, sequence=True)
    tokens, positions = inputs_of(8)
    check_on_ranks(program, local, parts, weights_of(model), tokens, positions)
