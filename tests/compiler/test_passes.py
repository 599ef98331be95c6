"""Each pass: what it makes of a small graph, that values stay, and that once is enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import einsum
from hypothesis import HealthCheck, given, settings

import funcmodels as fm
from compiler.comm import Simulated
from compiler.ir import Program
from compiler.own_parameters import own_parameters
from compiler.partition import Partitioned, partition
from compiler.passes import PIPELINE, run_passes
from compiler.passes.outline_layers import outline_layers
from compiler.printer import format_block, format_program
from compiler.trace import trace
from compiler.verify import verify
from funcmodels import ops
from tests.compiler.engine_memory import engine_memory
from tests.compiler.programs import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    TABLE,
    allowed,
    axes,
    inputs_of,
    on_ranks,
    small,
    weights_of,
)
from tests.compiler.random_programs import Spec, model_of, specs
from tests.tiny_llama import tiny

P = axes()
PASSES = {run.__name__: run for run in PIPELINE}


def model(step: Callable[..., Any], params: dict[str, fm.Param], layers: int = 1) -> fm.Model:
    """embed -> step, for each layer -> unembed."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for p in params["layers"]:
            x = step(p, x, positions)
        return ops.unembed(x, params["head"])

    return small(forward, {"layers": [dict(params) for _ in range(layers)]}, TABLE)


def until(program: Program, name: str) -> Program:
    """The program as a pass finds it."""
    for other in PIPELINE:
        if other.__name__ == name:
            return program
        program = other(program)
    raise AssertionError(name)


# What each pass is shown on: a block, its parameters, and the lines of it that the pass changes


@fm.block
def attention(p, x, positions):
    q = einsum(x, p["q"], "... e, h d e -> ... h d")
    k = einsum(x, p["k"], "... e, h d e -> ... h d")
    v = einsum(x, p["v"], "... e, h d e -> ... h d")
    q, k = ops.rope(q, k, positions, theta=100.0)
    o = ops.attention(q, k, v)
    return einsum(o, p["o"], "... h d, e h d -> ... e")


@fm.block
def gated(p, x, positions):
    y = F.silu(x @ p["gate"].T) * F.linear(x, p["up"])
    return x + torch.matmul(y, p["down"].mT)


@fm.block
def biased(p, x, positions):
    y = F.linear(x, p["gate"], p["gate_bias"]).relu()
    return F.linear(y, p["down"]) + p["bias"]


@fm.block
def normed(p, x, positions):
    h = ops.rms_norm(x, p["norm"], eps=1e-5)
    return x + h @ p["gate"].T @ p["down"].T


@fm.block
def shares_kv(p, x, positions):
    q = einsum(x, p["q"], "... e, h d e -> ... h d")
    k = einsum(x, p["k"], "... e, h d e -> ... h d")
    turned_q, turned_k = ops.rope(q, k, positions, theta=100.0)
    return einsum(ops.attention(turned_q, turned_k, k), p["o"], "... h d, e h d -> ... e")


@fm.block
def norms_heads(p, x, positions):
    q = einsum(x, p["q"], "... e, h d e -> ... h d")
    q = ops.rms_norm(q.flatten(-2), p["norm"], eps=1e-5).unflatten(-1, q.shape[-2:])
    return einsum(q, p["o"], "... h d, e h d -> ... e")


@fm.block
def latent(p, x, positions):
    q = einsum(x, p["q"], "... e, h d e -> ... h d")
    q_nope, q_rope = q.split([q.shape[-1] - 2, 2], dim=-1)
    k_rope = einsum(x, p["k_rope"], "... e, r e -> ... r").unsqueeze(-2)
    q_rope, k_rope = ops.rope(q_rope, k_rope, positions, theta=100.0)
    o = ops.latent_attention(q_nope, q_rope, x, k_rope, p["kv_up"])
    return einsum(o, p["o"], "... h d, e h d -> ... e")


@fm.block
def routed(p, x, positions):
    weights, ids = (x @ p["router"].T).softmax(-1).topk(2, dim=-1)
    return x + ops.experts(x, weights, ids, p["gate"], p["up"], p["down"], activation="silu")


@fm.block
def casts(p, x, positions):
    y = F.linear(x.to(x.dtype), p["up"]).float()
    return x + F.linear(y.exp().float().to(x.dtype), p["down"])


@fm.block
def parted(p, x, positions):
    z, x_, dt = (einsum(x, p[name], "... e, m e -> ... m") for name in ("z", "x", "dt"))
    y = F.linear(z.sigmoid() * x_ + p["z_bias"], p["down"])
    return y + F.linear(dt.tanh(), p["out"])


@fm.block
def recurs(p, x, positions):
    def step(state, v):
        return {"S": state["S"] + v.detach()}, state["S"]

    v = einsum(x, p["v"], "... e, h d e -> ... h d")
    state = fm.state(S="kv_heads head_dim", dtype=v.dtype, kv_heads=2, head_dim=4)
    return x + ops.recurrent(step, state, v).flatten(-2)[..., :1]


QKVO = {
    "q": P("heads head_dim hidden"),
    "k": P("kv_heads head_dim hidden"),
    "v": P("kv_heads head_dim hidden"),
    "o": P("hidden heads head_dim"),
}
UP = fm.axes(rope=2, heads=HEADS, up=2 * HEAD_DIM, v=HEAD_DIM + 2, hidden=HIDDEN)
LATENT = {
    "q": QKVO["q"],
    "k_rope": UP("rope hidden"),
    "kv_up": UP("heads up hidden"),
    "o": UP("hidden heads v"),
}
PARTS = fm.axes(mlp=16, heads=4, hidden=HIDDEN)
PARTED = {
    "z": PARTS("mlp hidden", hf="{layers}.in_proj.weight: mlp[0:16/36] hidden"),
    "x": PARTS("mlp hidden", hf="{layers}.in_proj.weight: mlp[16:32/36] hidden"),
    "dt": PARTS("heads hidden", hf="{layers}.in_proj.weight: heads[32:36/36] hidden"),
    "z_bias": PARTS("mlp"),
    "down": PARTS("hidden mlp"),
    "out": PARTS("hidden heads"),
}
GATED = {"gate": P("mlp hidden"), "up": P("mlp hidden"), "down": P("hidden mlp")}
MIX = fm.axes(experts=4, mlp=12, hidden=HIDDEN)
ROUTED = {
    "router": MIX("experts hidden"),
    "gate": MIX("experts mlp hidden"),
    "up": MIX("experts mlp hidden"),
    "down": MIX("experts hidden mlp"),
}
BIASED = {**GATED, "gate_bias": P("mlp"), "bias": P("hidden"), "norm": P("hidden")}

SHOWN: dict[str, tuple[Any, dict[str, fm.Param], str]] = {
    "drop_gradients": (gated, GATED, "gated"),
    "drop_step_gradients": (recurs, {"v": QKVO["v"]}, "recurs"),
    "cancel_casts": (casts, GATED, "casts"),
    "merge_parts": (parted, PARTED, "parted"),
    "cut_parameters": (
        norms_heads,
        {"q": QKVO["q"], "o": QKVO["o"], "norm": P("heads_dim")},
        "norms_heads",
    ),
    "lower_latent_attention": (latent, LATENT, "latent"),
    "lower_linear": (gated, GATED, "gated"),
    "lower_experts": (routed, ROUTED, "routed"),
    "fuse_bias": (biased, BIASED, "biased"),
    "silu_and_mul": (gated, GATED, "gated"),
    "fuse_gate_up": (gated, GATED, "gated"),
    "fuse_qkv": (attention, QKVO, "attention"),
    "flatten_heads": (attention, QKVO, "attention"),
    "cancel_reshapes": (attention, QKVO, "attention"),
    "lower_vocab": (gated, GATED, "forward"),
    "fuse_add_rms_norm": (normed, BIASED, "normed"),
    "keep_operands": (shares_kv, QKVO, "shares_kv"),
}


def changes(before: str, after: str) -> str:
    """The lines that only one of two texts has, without their alignment."""

    def lines(text: str) -> list[str]:
        cells = (line.split("   ") for line in text.splitlines()[1:])
        return ["   ".join(cell.strip() for cell in row if cell.strip()) for row in cells]

    old, new = lines(before), lines(after)
    gone = [f"- {line}" for line in old if line not in new]
    come = [f"+ {line}" for line in new if line not in old]
    return "\n".join([*gone, *come]) + "\n"


def block_of(program: Program, name: str) -> str:
    block = program.root if name == "forward" else program.blocks[name]
    return format_block(block, lines=False)


def equal_on_ranks(one: Partitioned, two: Partitioned, parts: int, vocab: int = 24) -> None:
    weights, (tokens, positions) = weights_of(one.model), inputs_of(5, vocab=vocab)
    comm = Simulated(parts)
    want = on_ranks(one, weights, tokens, positions, comm)
    got = on_ranks(two, weights, tokens, positions, comm)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PASSES)
def test_pass(name, golden):
    step, params, shown = SHOWN[name]
    before = until(partition(trace(model(step, params, layers=2))), name)
    after = PASSES[name](before)
    verify(after)
    golden(f"passes/{name}.txt", changes(block_of(before, shown), block_of(after, shown)))
    for parts in (1, 2, 4):
        equal_on_ranks(before, after, parts)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("bias", [False, True])
def test_twice_is_once(name, bias):
    program = until(partition(trace(tiny(attention_bias=bias, mlp_bias=bias))), name)
    once = PASSES[name](program)
    assert format_program(PASSES[name](once)) == format_program(once)


@pytest.mark.parametrize("name", PASSES)
def test_the_given_program_stays(name):
    program = until(partition(trace(tiny())), name)
    before = format_program(program)
    PASSES[name](program)
    assert format_program(program) == before


def test_every_pass_is_shown():
    assert set(SHOWN) == set(PASSES)


# The whole pipeline, on random programs


@given(specs())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def random_pipelines(spec: Spec) -> None:
    whole = model_of(spec)
    local = partition(outline_layers(trace(whole)))
    lowered = run_passes(local)
    weights = fm.tree.map(lambda w: 0.6 * w, weights_of(whole))
    tokens, positions = inputs_of(5, vocab=dict(spec.sizes)["vocab"])
    want = whole.forward(weights, tokens, positions)
    for parts in (1, 2, 3, 4):
        if not allowed(local, parts):
            continue
        with engine_memory():
            copies = fm.tree.map(torch.clone, weights)
            for got in on_ranks(lowered, copies, tokens, positions, Simulated(parts)):
                torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    assert format_program(run_passes(lowered)) == format_program(lowered)


@pytest.mark.slow
def test_random_pipelines():
    random_pipelines()


# Outlining


def test_outline_layers():
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for p in params["layers"]:
            x = x + attention(p, x, positions)
            x = gated(p, x, positions)
        return ops.unembed(x, params["head"])

    layers = [{**QKVO, **GATED} for _ in range(4)]
    program = trace(small(forward, {"layers": layers}, TABLE))
    outlined = outline_layers(program)
    verify(outlined)
    assert list(outlined.blocks) == ["attention", "gated", "layer"]
    assert [str(call.target) for call in outlined.root.calls] == ["layer"] * 4
    equal_on_ranks(partition(program), partition(outlined), 2)
    assert format_program(outline_layers(outlined)) == format_program(outlined)


def test_outlining_stops_at_the_layers():
    """What follows the last layer is no part of it, though it looks like the others' beginning."""

    def forward(params, tokens, positions, segment_ids=None):
        first = x = ops.embed(tokens, params["embed"])
        for p in params["layers"]:
            x = gated(p, x + first, positions)
        return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-5), params["head"])

    layers = [{**GATED, "norm": P("hidden")} for _ in range(3)]
    program = trace(small(forward, {"layers": layers, "norm": P("hidden")}, TABLE))
    outlined = outline_layers(program)
    verify(outlined)
    equal_on_ranks(partition(program), partition(outlined), 2)


@pytest.mark.parametrize("turned", [False, True])
def test_outlining_layers_of_which_some_do_more(turned):
    """Every other one computes what the next one reads too, and the list may be gone backwards."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        order, h = range(4), x
        for j, i in enumerate(reversed(order) if turned else order):
            p = params["layers"][i]
            if j % 2 == 0:
                h = gated(p["more"], x, positions)
            x = gated(p["own"], x + h, positions) * params["gains"][i]
        return ops.unembed(x, params["head"])

    gains = fm.axes(layers=4)("layers")
    layers = [{"own": GATED, "more": GATED} for _ in range(4)]
    model = small(forward, {"layers": layers, "gains": gains}, TABLE)
    outlined = outline_layers(own_parameters(trace(model)))
    verify(outlined)
    kinds = ["layer", "layer_2"] * 2
    assert [str(call.target) for call in outlined.root.calls] == kinds
    equal_on_ranks(partition(trace(model)), partition(outlined), 2)


def test_layers_that_differ_are_blocks_of_their_own():
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for i, p in enumerate(params["layers"]):
            x = x * (2.0 if i % 2 else 0.5)
            x = gated(p, x, positions) * 0.5
        return ops.unembed(x, params["head"])

    program = trace(small(forward, {"layers": [dict(GATED) for _ in range(4)]}, TABLE))
    outlined = outline_layers(program)
    verify(outlined)
    equal_on_ranks(partition(program), partition(outlined), 2)
