"""What the tracer records: blocks once, the user's names and lines, the function's own values."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

import pytest
import torch
from einops import einsum, rearrange, reduce, repeat

import funcmodels as fm
from compiler.ir import Sym, TensorType, target_name
from compiler.printer import format_program
from compiler.trace import trace
from funcmodels import ops
from tests.compiler.programs import axes, evaluated, inputs_of, small, weights_of
from tests.tiny_llama import tiny

P = axes()
LAYER = {"w": P("hidden"), "up": P("mlp hidden")}


def layers(count: int, **more: fm.Param) -> dict:
    return {"layers": [dict(LAYER) for _ in range(count)], "w": P("hidden"), **more}


def model(step, count: int = 3, **more: fm.Param) -> fm.Model:
    """embed -> step for the whole tree -> unembed."""

    def forward(params, tokens, positions, segment_ids=None):
        x = step(params, ops.embed(tokens, params["embed"]), positions)
        return ops.unembed(x, params["head"])

    return small(forward, layers(count, **more))


def check(model: fm.Model, *shapes: tuple[int, ...], batched: bool = False):
    """The recorded program has the function's values, for several numbers of tokens."""
    program = trace(model, batched=batched)
    weights = weights_of(model)
    for shape in shapes or (((2, 3), (1, 7)) if batched else ((1,), (5,), (9,))):
        tokens, positions = inputs_of(*shape)
        want = model.forward(weights, tokens, positions)
        got = evaluated(program, weights, tokens, positions)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    return program


# Blocks


@fm.block
def scale(p, x, factor=1.0):
    y = x * p["w"]
    return y * factor


@fm.block
def gated(p, x):
    up = einsum(x, p["up"], "... e, f e -> ... f")
    return x + einsum(torch.relu(up), p["up"], "... f, f e -> ... e")


@fm.block
def both(p, x):
    return scale(p, gated(p, x)) + gated(p, x)


def names(program) -> list[str]:
    return list(program.blocks)


def test_a_block_is_recorded_once():
    def step(p, x, positions):
        for layer in p["layers"]:
            x = scale(layer, x)
        return x

    program = check(model(step))
    assert names(program) == ["scale"]
    assert len(program.root.calls) == 3


@pytest.mark.parametrize("count", [1, 2, 7])
def test_depth_adds_calls_only(count):
    program = trace(tiny(num_hidden_layers=count))
    assert names(program) == ["attention", "mlp", "decoder_layer"]
    assert sum(len(block.graph.nodes) for block in program.blocks.values()) == 35
    assert len(program.root.graph.nodes) == 9 + count


def test_static_arguments_tell_blocks_apart():
    def step(p, x, positions):
        for i, layer in enumerate(p["layers"]):
            x = scale(layer, x, 2.0 if i % 2 else 1.0)
        return scale(p["layers"][0], x, factor=2.0)

    program = check(model(step, 4))
    assert names(program) == ["scale", "scale_2", "scale_3"]  # the last is called by keyword
    calls = [str(call.target) for call in program.root.calls]
    assert calls == ["scale", "scale_2", "scale", "scale_2", "scale_3"]


def test_equal_numbers_of_two_types_are_two_blocks():
    """1 and 1.0 and True are equal in Python, and are not the same to a dtype."""

    def step(p, x, positions):
        for layer, factor in zip(p["layers"], (1, 1.0, True), strict=True):
            x = scale(layer, x, factor)
        return x

    assert len(names(check(model(step)))) == 3


def test_shapes_tell_blocks_apart():
    def step(p, x, positions):
        x = scale({"w": p["w"]}, x)
        return scale({"w": p["short"]}, x[..., :4]).repeat(*[1] * (x.ndim - 1), 4)

    program = check(model(step, short=P("heads")))
    assert names(program) == ["scale", "scale_2"]


def test_a_config_as_an_argument():
    @dataclass(frozen=True)
    class Config:
        factor: float

    @fm.block
    def block(p, x, cfg):
        return x * p["w"] * cfg.factor

    def step(p, x, positions):
        for layer in p["layers"]:
            x = block(layer, x, Config(2.0))
        return block(p["layers"][0], x, Config(3.0))

    assert names(check(model(step))) == ["block", "block_2"]


def test_what_a_block_reads_from_around_it():
    """A block's free variables are part of what it computes."""

    def step(p, x, positions):
        factor = 1.0

        @fm.block
        def block(q, x):
            return x * q["w"] * factor

        for i, layer in enumerate(p["layers"]):
            factor = float(i + 1)
            x = block(layer, x)
        return x

    assert names(check(model(step))) == ["block", "block_2", "block_3"]


def test_an_object_that_changes():
    class Settings:
        factor = 1.0

    @fm.block
    def block(p, x, settings):
        return x * p["w"] * settings.factor

    def step(p, x, positions):
        settings = Settings()
        for i, layer in enumerate(p["layers"]):
            settings.factor = float(i + 1)
            x = block(layer, x, settings)
        return x

    check(model(step))


def test_one_tensor_given_twice():
    """A recording in which two arguments are one tensor says nothing of two that are not."""

    @fm.block
    def difference(p, a, b):
        return a * p["w"] - b

    def step(p, x, positions):
        y = difference(p["layers"][0], x, x)
        return difference(p["layers"][1], x, y * 3)

    assert names(check(model(step))) == ["difference", "difference_2"]


def test_one_parameter_given_twice():
    @fm.block
    def difference(p, x):
        return x * p["a"] - p["b"]

    def step(p, x, positions):
        first, second = p["layers"][0]["w"], p["layers"][1]["w"]
        x = difference({"a": first, "b": first}, x)
        return difference({"a": first, "b": second}, x)

    assert names(check(model(step))) == ["difference", "difference_2"]


def test_nested_blocks():
    def step(p, x, positions):
        for layer in p["layers"]:
            x = both(layer, x)
        return x

    program = check(model(step))
    assert names(program) == ["gated", "scale", "both"]
    assert [str(call.target) for call in program.blocks["both"].calls] == [
        "gated",
        "scale",
        "gated",
    ]


def test_results_of_a_block():
    @fm.block
    def several(p, x):
        return {"y": x * p["w"], "count": 3, "rest": [x, None]}

    def step(p, x, positions):
        found = several(p["layers"][0], x)
        assert found["rest"][1] is None
        return found["y"] * found["count"] + found["rest"][0]

    check(model(step))


def test_a_block_returns_its_parameter():
    @fm.block
    def block(p, x):
        return p["w"], x

    def step(p, x, positions):
        for layer in p["layers"]:
            w, x = block(layer, x)
            x = x * w
        return x

    check(model(step))


def test_values_carried_in_a_list():
    @fm.block
    def block(p, x, seen):
        return x * p["w"] + sum(seen), [*seen, x]

    def step(p, x, positions):
        seen = []
        for layer in p["layers"]:
            x, seen = block(layer, x, seen)
        return x

    assert len(names(check(model(step)))) == 3  # each takes one value more


@pytest.mark.parametrize("fn", ["lambda", "partial", "keyword", "star"])
def test_kinds_of_functions(fn):
    def keyword(x, *, q):
        return x * q["w"]

    def star(*args):
        return args[1] * args[0]["w"]

    blocks = {
        "lambda": fm.block(lambda q, x: x * q["w"]),
        "partial": fm.block(functools.partial(scale.__wrapped__, factor=2.0)),
        "keyword": fm.block(keyword),
        "star": fm.block(star),
    }

    def step(p, x, positions):
        for layer in p["layers"]:
            x = blocks[fn](x, q=layer) if fn == "keyword" else blocks[fn](layer, x)
        return x

    program = check(model(step))
    assert len(program.blocks) == 1
    assert all(name.isidentifier() for name in program.blocks)


# Parameters


def test_parameters_by_their_names():
    program = trace(tiny())
    assert set(program.blocks["attention"].params) == {"q", "k", "v", "o"}
    assert "attn.q" in program.blocks["decoder_layer"].params
    binding = program.root.calls[1].meta["binding"]
    assert binding["attn.q"] == "layers.1.attn.q"


def test_tied_parameters_are_one():
    program = trace(tiny(tie_word_embeddings=True))
    reads = [n for n in program.root.graph.nodes if n.op == "get_attr" and n.target == "embed"]
    assert len(reads) == 1
    assert len(reads[0].users) == 2


def test_unused_parameters_stay_declared():
    program = check(model(lambda p, x, positions: x))
    assert "layers.0.up" in program.root.params


def test_a_scalar_and_a_typed_parameter():
    def step(p, x, positions):
        return (x.float() * p["wide"]).to(x.dtype) * p["scalar"]

    program = check(model(step, scalar=P(""), wide=P("hidden", dtype=torch.float32)))
    types = {str(n.target): n.meta["type"] for n in program.root.graph.nodes if n.op == "get_attr"}
    assert str(types["scalar"]) == "model[]"
    assert str(types["wide"]) == "float32[16]"


# Names, lines, types


def test_the_users_names():
    program = trace(tiny())
    found = [node.name for node in program.blocks["mlp"].graph.nodes if node.op == "call_function"]
    assert found == ["gate_1", "up_1", "swiglu", "down_1"]  # gate, up and down are parameters


def test_names_of_several_targets():
    def step(p, x, positions):
        left, right = x.chunk(2, -1)
        first = second = left * right
        return torch.cat((first + second, right), -1)

    nodes = {node.name for node in trace(model(step)).root.graph.nodes}
    assert {"left", "right"} <= nodes


def test_lines_are_the_users():
    program = trace(model(lambda p, x, positions: gated(p["layers"][0], x)))
    source, first = inspect.getsourcelines(gated.__wrapped__)
    for node in program.blocks["gated"].graph.nodes:
        if node.op != "call_function":
            continue
        where = node.meta["where"]
        assert where.file == __file__
        assert where.function == "gated"
        text = source[where.line - first]
        assert ("relu" in text) or ("einsum" in text)


def test_types():
    program = trace(tiny())
    (logits,) = program.root.results
    assert str(logits.meta["type"]) == "model[num_tokens, 97]"
    assert logits.meta["type"].shape[0] == Sym("num_tokens")
    batched = trace(tiny(), batched=True)
    assert str(batched.root.results[0].meta["type"]) == "model[batch, seq, 97]"
    for block in program.all():
        for node in block.graph.nodes:
            if node.op != "output":
                types = node.meta["type"]
                assert all(
                    isinstance(t, TensorType)
                    for t in (types if isinstance(types, tuple) else (types,))
                )


def test_derived_sizes():
    def step(p, x, positions):
        flat = x.reshape(-1)
        return flat.reshape(x.shape)

    program = check(model(step))
    types = [str(n.meta["type"]) for n in program.root.graph.nodes if n.target is torch.reshape]
    assert types[0] == "model[16*num_tokens]"


def test_recording_twice_gives_the_same():
    assert format_program(trace(tiny())) == format_program(trace(tiny()))


# Ways to write things


def by_heads(p, x, positions):
    q = rearrange(x, "... (h d) -> ... h d", h=4)
    q = q * repeat(p["w"], "(h d) -> h d", h=4)
    q = q - reduce(q, "... h d -> ... 1 d", "mean")
    return rearrange(q, "... h d -> ... (d h)")


def loops(p, x, positions):
    for i in range(3):
        x = x * p["w"] if i != 1 else x + i
    return x


def comprehension(p, x, positions):
    return sum(x * layer["w"] for layer in p["layers"])


def conditions(p, x, positions):
    if "up" in p["layers"][0] and x.shape[-1] == 16 and x.ndim == positions.ndim + 1:
        return x * 2
    return x


def indexing(p, x, positions):
    return torch.cat((x[..., 4:], x[..., :4]), -1) + x[..., None, 0] + x[..., ::1]


def methods(p, x, positions):
    h = x.view(*x.shape[:-1], 4, 4).transpose(-1, -2).contiguous().flatten(-2)
    return h.float().pow(2).mean(-1, keepdim=True).add(1.0).rsqrt().to(x.dtype) * h.clone()


def products(p, x, positions):
    up = p["layers"][0]["up"]
    return x @ up.T @ up + torch.einsum("...e,fe->...f", x, up) @ up + x.matmul(up.mT).matmul(up)


def constants(p, x, positions):
    steps = torch.arange(16, device=x.device, dtype=x.dtype) / 16
    scale = torch.tensor(0.5, device=x.device)
    return x * steps + torch.ones(16, device="cpu").to(x.device, x.dtype) * scale


def padding(p, x, positions):
    return torch.nn.functional.pad(x, (4, 0))[..., :16] + x


@torch.compile(backend="eager")
def compiled_activation(x):
    return torch.nn.functional.silu(x) * 2


def compiled_functions(p, x, positions):
    """What they do is recorded: what is served, the engine compiles as a whole."""
    return torch.compile(lambda y: y * p["w"], backend="eager")(compiled_activation(x))


WAYS = (
    by_heads, loops, comprehension, conditions, indexing, methods, products, constants, padding,
    compiled_functions,
)  # fmt: skip


@pytest.mark.parametrize("step", WAYS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("batched", [False, True])
def test_ways_to_write(step, batched):
    check(model(step), batched=batched)


def test_einsum_is_one_node():
    program = trace(model(lambda p, x, positions: gated(p["layers"][0], x)))
    calls = [n for n in program.blocks["gated"].graph.nodes if n.op == "call_function"]
    assert [target_name(n.target) for n in calls] == [
        "torch.einsum",
        "torch.relu",
        "torch.einsum",
        "torch.add",
    ]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("batched", [False, True])
def test_llama(kv_heads, batched):
    check(tiny(num_key_value_heads=kv_heads, vocab_size=24), batched=batched)


def test_segments():
    llama = tiny(vocab_size=24)
    program = trace(llama, segments=True)
    assert [node.name for node in program.root.inputs] == ["tokens", "positions", "segment_ids"]


def test_dataclass_parameters():
    @fm.tree.dataclass
    class Layer:
        w: fm.Param
        up: fm.Param

    @fm.block
    def block(p, x):
        return x * p.w

    def step(p, x, positions):
        for layer in p["layers"]:
            x = block(layer, x)
        return x

    def forward(params, tokens, positions, segment_ids=None):
        x = step(params, ops.embed(tokens, params["embed"]), positions)
        return ops.unembed(x, params["head"])

    program = check(small(forward, {"layers": [Layer(**LAYER) for _ in range(2)]}))
    assert set(program.blocks["block"].params) == {"w", "up"}


def test_nothing_is_allocated():
    """A model of many gigabytes is traced on shapes alone."""
    big = tiny(hidden_size=16384, intermediate_size=53248, vocab_size=128256, num_hidden_layers=3)
    program = trace(big)
    assert len(program.blocks) == 3
