"""Layers that overwrite their operands: values are right where the engine's kernels work in place.

Each program here reads a value after a layer may have written over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import einsum

import funcmodels as fm
from compiler import layers
from compiler.comm import Simulated
from compiler.partition import partition
from compiler.passes import PIPELINE, run_passes
from compiler.passes.keep_operands import keep_operands
from compiler.passes.outline_layers import outline_layers
from compiler.rewrite import calls_of
from compiler.trace import trace
from funcmodels import ops
from tests.compiler.engine_memory import engine_memory
from tests.compiler.programs import TABLE, axes, inputs_of, on_ranks, small, weights_of

P = axes()
CASES: dict[str, Callable[..., Any]] = {}


def case(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A program of layers' parameters, the embedded tokens and positions."""
    CASES[fn.__name__] = fn
    return fn


QK = {
    "norm": P("hidden"),
    "q": P("heads head_dim hidden"),
    "k": P("kv_heads head_dim hidden"),
    "v": P("kv_heads head_dim hidden"),
    "o": P("hidden heads head_dim"),
    "gate": P("mlp hidden"),
    "up": P("mlp hidden"),
    "down": P("hidden mlp"),
    "n2": P("hidden"),
}


@fm.block
def attn(p, x, pos):
    h = ops.rms_norm(x, p["norm"], eps=1e-5)
    q, k, v = (einsum(h, p[n], "... e, h d e -> ... h d") for n in "qkv")
    q, k = ops.rope(q, k, pos, theta=100.0)
    return x + einsum(ops.attention(q, k, v), p["o"], "... h d, e h d -> ... e")


@fm.block
def mlp(p, x):
    h = ops.rms_norm(x, p["n2"], eps=1e-5)
    return x + ops.swiglu(h @ p["gate"].T, h @ p["up"].T) @ p["down"].T


@fm.block
def kv_shared(p, x, pos):
    h = ops.rms_norm(x, p["norm"], eps=1e-5)
    q, k = (einsum(h, p[n], "... e, h d e -> ... h d") for n in "qk")
    q2, k2 = ops.rope(q, k, pos, theta=100.0)
    return x + einsum(ops.attention(q2, k2, k), p["o"], "... h d, e h d -> ... e")


@fm.block
def gate_unrot(p, x, pos):
    h = ops.rms_norm(x, p["norm"], eps=1e-5)
    q, k, v = (einsum(h, p[n], "... e, h d e -> ... h d") for n in "qkv")
    q2, k2 = ops.rope(q, k, pos, theta=100.0)
    return x + einsum(ops.attention(q2, k2, v) * q.sigmoid(), p["o"], "... h d, e h d -> ... e")


@fm.block
def twice_rope(p, x, pos):
    h = ops.rms_norm(x, p["norm"], eps=1e-5)
    q, k, v = (einsum(h, p[n], "... e, h d e -> ... h d") for n in "qkv")
    q2, k2 = ops.rope(q, k, pos, theta=100.0)
    q3, k3 = ops.rope(q, k, pos, theta=10.0)
    return x + einsum(
        ops.attention(q2, k2, v) + ops.attention(q3, k3, v), p["o"], "... h d, e h d -> ... e"
    )


@fm.block
def ident(p, x):
    return x


@case
def plain(params, x, positions):
    for p in params:
        x = mlp(p, attn(p, x, positions))
    return x


@case
def embed_late(params, x, positions):
    x0 = x
    for p in params:
        x = mlp(p, attn(p, x, positions))
    return x + x0


@case
def embed_each(params, x, positions):
    x0 = x
    for p in params:
        x = mlp(p, attn(p, x + x0, positions))
    return x


@case
def first_to_last(params, x, positions):
    xs = []
    for p in params:
        x = attn(p, x, positions)
        xs.append(x)
        x = mlp(p, x)
    return x + xs[0]


@case
def same_to_two(params, x, positions):
    for p in params:
        x = attn(p, x, positions) + mlp(p, x)
    return x


@case
def parallel(params, x, positions):
    for p in params:
        a = attn(p, x, positions)
        b = mlp(p, x)
        x = a + b
    return x


@case
def inline(params, x, positions):
    for p in params:
        h = ops.rms_norm(x, p["norm"], eps=1e-5)
        y = h @ p["gate"].T @ p["down"].T
        x = x + y
        h = ops.rms_norm(x, p["n2"], eps=1e-5)
        x = x + h @ p["up"].T @ p["down"].T
    return x


@case
def inline_y_late(params, x, positions):
    for p in params:
        h = ops.rms_norm(x, p["norm"], eps=1e-5)
        y = h @ p["gate"].T @ p["down"].T
        s = x + y
        h = ops.rms_norm(s, p["n2"], eps=1e-5)
        x = s + h @ p["up"].T @ p["down"].T + y
    return x


@case
def view_operand(params, x, positions):
    for p in params:
        big = torch.cat((x @ p["gate"].T @ p["down"].T, x), -1)
        a, b = big.chunk(2, -1)
        s = a + b
        h = ops.rms_norm(s, p["n2"], eps=1e-5)
        x = h + big[..., :16] * 0.5
    return x


@case
def reshape_operand(params, x, positions):
    for p in params:
        y = x @ p["gate"].T @ p["down"].T
        v = y.reshape(-1, 4, 4).reshape(-1, 16)
        s = x + v
        h = ops.rms_norm(s, p["n2"], eps=1e-5)
        x = h + y * 0.5
    return x


@case
def to_operand(params, x, positions):
    for p in params:
        y = x @ p["gate"].T @ p["down"].T
        v = y.to(x.dtype)
        s = x + v
        h = ops.rms_norm(s, p["n2"], eps=1e-5)
        x = h + y * 0.5
    return x


@case
def detach_operand(params, x, positions):
    for p in params:
        y = x @ p["gate"].T @ p["down"].T
        s = x + y.detach()
        h = ops.rms_norm(s, p["n2"], eps=1e-5)
        x = h + y * 0.5
    return x


@case
def other_views(params, x, positions):
    """Memory of an operand seen by other operations than reshapes, read after it is written."""
    for p in params:
        y = x @ p["gate"].T @ p["down"].T
        seen = [
            y.narrow(-1, 0, 16), y.unfold(-1, 16, 1).squeeze(-2), torch.real(y), y.conj(), +y,
            torch.einsum("ab->ab", y), y.expand_as(y), y.tensor_split(1, -1)[0],
        ]  # fmt: skip
        h = ops.rms_norm(x + y, p["n2"], eps=1e-5)
        x = h + sum(0.1 * i * v for i, v in enumerate(seen))
    return x


@case
def expand_operand(params, x, positions):
    for p in params:
        v = p["n2"].expand(x.shape)
        s = x + v
        h = ops.rms_norm(s, p["n2"], eps=1e-5)
        x = s + h @ p["gate"].T @ p["down"].T
    return x


@case
def ident_block(params, x, positions):
    for p in params:
        y = x @ p["gate"].T @ p["down"].T
        z = ident(p, y)
        s = x + z
        h = ops.rms_norm(s, p["n2"], eps=1e-5)
        x = h + y
    return x


@case
def ident_block2(params, x, positions):
    for p in params:
        y = x * 2
        z = ident(p, y)
        x = attn(p, z, positions) + y
    return x


@case
def two_norms(params, x, positions):
    for p in params:
        s = x + x @ p["gate"].T @ p["down"].T
        x = ops.rms_norm(s, p["norm"], eps=1e-5) + ops.rms_norm(s, p["n2"], eps=1e-5)
    return x


@case
def norm_reused(params, x, positions):
    for p in params:
        s = x + x @ p["gate"].T @ p["down"].T
        h = ops.rms_norm(s, p["norm"], eps=1e-5)
        x = h + h @ p["up"].T @ p["down"].T
        x = ops.rms_norm(x, p["n2"], eps=1e-5) + h
    return x


@case
def kvshared(params, x, positions):
    for p in params:
        x = kv_shared(p, x, positions)
    return x


@case
def gateunrot(params, x, positions):
    for p in params:
        x = gate_unrot(p, x, positions)
    return x


@case
def twicerope(params, x, positions):
    for p in params:
        x = twice_rope(p, x, positions)
    return x


@case
def x_twice(params, x, positions):
    for p in params:
        x = mlp(p, x + attn(p, x, positions))
    return x


@case
def add_param(params, x, positions):
    for p in params:
        x = mlp(p, x + p["norm"])
    return x


@case
def mixed_last(params, x, positions):
    x = attn(params[0], x, positions)
    y = mlp(params[0], x)
    z = mlp(params[1], y)
    return z + y


@case
def block_result_twice(params, x, positions):
    x = attn(params[0], x, positions)
    y = mlp(params[0], x)
    z = mlp(params[1], x)
    return attn(params[1], z + y, positions)


@case
def cat_view(params, x, positions):
    for p in params:
        y = x @ p["gate"].T @ p["down"].T
        s = x + y[..., :]
        h = ops.rms_norm(s, p["n2"], eps=1e-5)
        x = h + y
    return x


def model_of(fn: Callable[..., Any]) -> fm.Model:
    def forward(params, tokens, positions, segment_ids=None):
        x = fn(params["layers"], ops.embed(tokens, params["embed"]), positions)
        return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-5), params["head"])

    layers = [dict(QK) for _ in range(3)]
    return small(forward, {"layers": layers, "norm": P("hidden")}, TABLE)


def lowered(model: fm.Model, skip: Any = None) -> Any:
    program = partition(outline_layers(trace(model)))
    for run in PIPELINE:
        program = program if run is skip else run(program)
    return program


def agrees(model: fm.Model, program: Any, parts: int) -> bool:
    """Whether a program whose layers overwrite their operands gives the model's values."""
    weights, (tokens, positions) = weights_of(model), inputs_of(5)
    want = model.forward(weights, tokens, positions)
    with engine_memory():
        found = on_ranks(
            program, fm.tree.map(torch.clone, weights), tokens, positions, Simulated(parts)
        )
    return all(torch.allclose(one, want) for one in found)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_read_after_it_was_overwritten(name):
    model = model_of(CASES[name])
    program = run_passes(partition(outline_layers(trace(model))))
    for parts in (1, 2, 4):
        assert agrees(model, program, parts)


@pytest.mark.parametrize("name", ["embed_each", "view_operand", "kvshared", "ident_block"])
def test_without_the_pass_values_are_wrong(name):
    """The guard is needed, and the tests above can fail."""
    model = model_of(CASES[name])
    assert not agrees(model, lowered(model, skip=keep_operands), 2)


@pytest.mark.parametrize("name", ["plain", "parallel", "two_norms"])
def test_nothing_is_copied_without_need(name):
    program = lowered(model_of(CASES[name]))
    expected = {"plain": 0, "parallel": 2, "two_norms": 0}[name]
    assert sum(len(calls_of(block, torch.clone)) for block in program.all()) == expected


def test_norms_are_fused():
    program = lowered(model_of(CASES["plain"]))
    fused = [n for block in program.all() for n in calls_of(block, layers.add_rms_norm)]
    assert len(fused) == 3  # attention's, the feed-forward's, and the last
    assert not any(calls_of(block, ops.rms_norm) for block in program.all())
