"""torch.func transforms and torch.utils.checkpoint inside a model: recorded right, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch.func import grad, grad_and_value, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

import funcmodels as fm
from compiler.ir import target_name
from compiler.partition import partition
from compiler.tokens_apart import check_tokens_apart
from compiler.trace import trace
from compiler.vllm_target import source_for_vllm
from funcmodels import ops
from funcmodels.errors import LoweringError, TraceError
from tests.compiler.programs import (
    TABLE,
    allowed,
    axes,
    check_on_ranks,
    inputs_of,
    small,
    weights_of,
)

P = axes()
PARAMS = {
    "q": P("heads head_dim hidden"),
    "k": P("kv_heads head_dim hidden"),
    "v": P("kv_heads head_dim hidden"),
    "o": P("hidden heads head_dim"),
    "up": P("mlp hidden"),
    "w": P("hidden"),
    "scale": P("heads"),
}


def model_of(body: Any) -> fm.Model:
    """embed -> body -> unembed."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        return ops.unembed(body(params, x, positions), params["head"])

    return small(forward, PARAMS, TABLE)


# What is recorded


def over_heads(p, x, s):
    """Each head by itself, its weights taken from two layouts."""

    def head(q, o):
        return F.silu(x @ q.T) @ o.T

    return x + vmap(head, in_dims=(0, 1))(p["q"], p["o"]).sum(0)


def over_heads_out(p, x, s):
    """A function with a constant, a captured value and another place for the mapped dim."""

    def head(q, scale):
        h = F.linear(x, q) * torch.tensor(2.0) + scale
        return h / (1 + h.square().sum(-1, keepdim=True)) + torch.arange(4).to(x.dtype)

    h = vmap(head, out_dims=-2)(p["q"], p["scale"])
    return x + einsum(h, p["o"], "... h d, e h d -> ... e")


def over_heads_of_an_activation(p, x, s):
    """A softmax, a split and a product of each head with itself."""
    h = einsum(x, p["q"], "... e, h d e -> ... h d")

    def head(y):
        a, b = y.softmax(-1).split(2, -1)
        return torch.cat((b, a * torch.where(a > 0.2, a, b)), -1)

    y = vmap(head, in_dims=-2, out_dims=-2)(h)
    return x + einsum(y, p["o"], "... h d, e h d -> ... e")


def over_rows_of_heads(p, x, s):
    """A split of the dim that is cut, which takes it whole."""
    h = einsum(x, p["q"], "... e, h d e -> ... h d")

    def row(y):
        a, b = y.split(2, -1)
        return torch.cat((b, torch.tanh(a)), -1)

    y = vmap(row, in_dims=-1, out_dims=-1)(h)
    return x + einsum(y, p["o"], "... h d, e h d -> ... e")


def attention_of_heads(p, x, s):
    """Each head attends by itself; every query head has its own keys."""

    def head(q, k, v, scale):
        q, k, v = ((x @ w.T)[..., None, :] for w in (q, k, v))
        return ops.attention(q, k, v, window=3, sinks=scale[None], alibi_slopes=[0.3])[..., 0, :]

    y = vmap(head, out_dims=-2)(p["q"], p["q"] * 2, p["o"].movedim(0, -1), p["scale"])
    return x + einsum(y, p["o"], "... h d, e h d -> ... e")


def attention_of_groups(p, x, s):
    """Each key head with the query heads of its group; and of nested maps, all with one value."""

    def group(q, k):
        return ops.attention(
            einsum(x, q, "... e, h d e -> ... h d"), (x @ k.T)[..., None, :], x[..., None, :4]
        )

    y = vmap(group, out_dims=-3)(rearrange(p["q"], "(g h) d e -> g h d e", g=2), p["k"])

    def one(q, o):
        q, o = (x @ q.T)[..., None, :], (x @ o)[..., None, :]
        return ops.attention(q, o, x[..., None, :3], softcap=2.0).sum((-1, -2))

    z = vmap(vmap(one, (0, None)), (None, 1))(p["q"], p["o"])
    return (
        x + einsum(y.flatten(-3, -2), p["o"], "... h d, e h d -> ... e") + z.sum((0, 1))[..., None]
    )


def nested(p, x, s):
    """Over heads and, in each, over its rows."""

    def row(q, o):
        return torch.tanh(x @ q)[..., None] * o

    return x + vmap(vmap(row), in_dims=(0, 1))(p["q"], rearrange(p["o"], "e h d -> d h e")).sum(
        (0, 1)
    )


def over_several(p, x, s):
    """A pytree of operands, of which one is not mapped, and a pytree of results."""

    def head(t, scale):
        return {"a": t["q"] @ t["w"], "b": scale * 2}

    out = vmap(head, in_dims=({"q": 0, "w": None}, 0))({"q": p["q"], "w": p["w"]}, p["scale"])
    y = out["a"] * out["b"][:, None]
    return x + einsum(y, p["o"], "h d, e h d -> e")


def over_tokens(p, x, s):
    """Each token by itself."""
    one = lambda y: torch.relu(p["up"] @ y) @ p["up"]  # noqa: E731
    for _ in range(x.dim() - 1):
        one = vmap(one)
    return x + one(x)


def chunks(p, x, s):
    return x + vmap(lambda q: torch.tanh(x @ q.T) @ q, chunk_size=2)(p["q"]).sum(0)


def gradient(p, x, s):
    """One step of a gradient on each token, as in test-time training."""

    def energy(y):
        return (torch.sin(p["up"] @ y)).sum()

    step = grad(energy)
    for _ in range(x.dim() - 1):
        step = vmap(step)
    return x - 0.1 * step(x)


def gradient_and_value(p, x, s):
    g, value = grad_and_value(lambda w: (w**3).sum())(p["w"])
    return x * g + value


def tangent(p, x, s):
    return x + jvp(lambda y: torch.sin(y) @ p["up"].T, (x,), (x * 0 + 1,))[1] @ p["up"]


def makes_tensors(p, x, s):
    """What torch makes of nothing below a vmap lies where the inputs do."""
    one = lambda y: y * F.one_hot(y.argmax(), 16).to(y.dtype) + torch.eye(16).sum(0)  # noqa: E731
    for _ in range(x.dim() - 1):
        one = vmap(one)
    return x + one(x)


@fm.block
def a_block(p, x):
    return torch.relu(x @ p["q"].T)


def block_inside(p, x, s):
    """A block that a transform calls is part of the caller."""
    h = vmap(lambda q: a_block({"q": q}, x), out_dims=-2)(p["q"])
    return x + einsum(h, p["o"], "... h d, e h d -> ... e")


@fm.block
def maps_inside(p, x):
    h = vmap(lambda q: torch.relu(x @ q.T), out_dims=-2)(p["q"])
    return x + einsum(h, p["o"], "... h d, e h d -> ... e")


def inside_a_block(p, x, s):
    own = {"q": p["q"], "o": p["o"]}
    return maps_inside(own, maps_inside(own, x))


def mlp(p, x):
    return x + torch.relu(x @ p["up"].T) @ p["up"]


def checkpointed(p, x, s):
    x = checkpoint(mlp, p, x, use_reentrant=False)
    return checkpointing.checkpoint(lambda y: mlp(p, y), x, use_reentrant=False)


@fm.block
def checkpointed_block(p, x):
    return checkpoint(mlp, p, x, use_reentrant=False)


def checkpoint_in_a_block(p, x, s):
    return checkpointed_block({"up": p["up"]}, x)


def checkpointed_call(p, x, s):
    return checkpoint(checkpointed_block, {"up": p["up"]}, x, use_reentrant=False)


ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus,
    "elu": F.elu, "selu": F.selu, "celu": F.celu, "leaky_relu": F.leaky_relu, "mish": F.mish,
    "logsigmoid": F.logsigmoid, "relu6": F.relu6, "hardtanh": F.hardtanh, "hardswish": F.hardswish,
    "squared_relu": lambda y: F.relu(y).square(), "erf": torch.erf,
    "abs": torch.abs, "sqrt": lambda y: (1 + y * y).sqrt(), "clamp": lambda y: y.clamp(-0.1, 0.2),
    "where": lambda y: torch.where(y > 0, y, 0.1 * y),
    "softmax": lambda y: y.unflatten(-1, (-1, 2)).softmax(-1),
    "log_softmax": lambda y: y.unflatten(-1, (-1, 2)).log_softmax(-1),
    "logsumexp": lambda y: y.unflatten(-1, (-1, 2)).logsumexp(-1),
}  # fmt: skip


def learning(activation: Any, mapped: bool) -> Any:
    """One step of gradient descent on each token, as in test-time training."""

    def body(p, x, s):
        step = grad(lambda y: (activation(y @ p["up"].T) * 1.5).square().sum())
        for _ in range(x.dim() - 1 if mapped else 0):
            step = vmap(step)
        return x - 0.1 * step(x)

    return body


def columns(p, x, s):
    """A Jacobian by its columns, of two parameters."""
    found = jacfwd(lambda w, v: torch.sin(w) * v.sum(), argnums=(0, 1))(p["w"], p["scale"])
    return x * found[0].sum(0) + found[1].sum(-1)


WORK = {
    body.__name__: body
    for body in (
        over_heads, over_heads_out, over_heads_of_an_activation, over_rows_of_heads, nested,
        over_several, over_tokens, chunks, gradient, gradient_and_value, tangent, makes_tensors,
        attention_of_heads, attention_of_groups, columns, block_inside, inside_a_block,
        checkpointed, checkpoint_in_a_block, checkpointed_call,
    )
}  # fmt: skip


BATCHED = ("over_heads_out", "over_heads_of_an_activation", "over_tokens", "gradient", "chunks",
           "makes_tensors", "attention_of_heads", "attention_of_groups")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "batched"), [*((name, False) for name in WORK), *((name, True) for name in BATCHED)]
)
def test_recorded(name, batched):
    model = model_of(WORK[name])
    program = trace(model, batched=batched)
    local = partition(program)
    tokens, positions = inputs_of(2, 5) if batched else inputs_of(5)
    for parts in (1, 2, 4):
        if allowed(local, parts):
            check_on_ranks(program, local, parts, weights_of(model), tokens, positions)
    assert allowed(local, 2)


@pytest.mark.parametrize(
    ("name", "mapped"),
    [*((name, True) for name in ACTIVATIONS), *((name, False) for name in ("gelu", "silu", "elu"))],
)
def test_gradients_of_activations(name, mapped):
    """The features stay cut, tokens stay apart, and the gradient is torch's."""
    model = model_of(learning(ACTIVATIONS[name], mapped))
    program = trace(model)
    check_tokens_apart(program)
    local = partition(program)
    assert not local.gathered
    for parts in (1, 2, 4):
        if allowed(local, parts):
            check_on_ranks(program, local, parts, weights_of(model), *inputs_of(5))
    assert allowed(local, 2)


@pytest.mark.parametrize(
    "name",
    ["over_heads", "over_heads_out", "block_inside", "inside_a_block", "attention_of_heads"],
)
def test_heads_stay_cut(name):
    """A vmap over heads is divided over ranks by heads, as what it stands for is."""
    program = trace(model_of(WORK[name]))
    local = partition(program)
    assert not local.gathered
    assert {target_name(n.target) for b in program.all() for n in b.graph.nodes} & {"torch.matmul"}


@pytest.mark.parametrize("name", WORK)
def test_served(name):
    text = source_for_vllm(model_of(WORK[name]))
    compile(text, "emitted.py", "exec")


def test_lines_are_the_users():
    program = trace(model_of(over_heads))
    found = {n.meta["where"].function for n in program.root.graph.nodes if n.op != "output"}
    assert found <= {"forward", "over_heads", "head", "<lambda>", "test_lines_are_the_users"}
    assert "head" in found


def test_torch_is_as_before():
    before = checkpointing.CheckpointFunction, torch._functorch.apis.vmap_impl
    trace(model_of(over_heads))
    with pytest.raises(TraceError):
        trace(model_of(lambda p, x, s: vmap(lambda q: q * float(q.sum()))(p["q"]).sum() + x))
    assert before == (checkpointing.CheckpointFunction, torch._functorch.apis.vmap_impl)


# What is refused

A_TENSOR = torch.ones(4, 16)


def reads_global(p, x, s):
    return x + vmap(lambda q: (q * A_TENSOR).sum(0))(p["q"]).sum(0)


def branches(p, x, s):
    return x + vmap(lambda q: q if q.sum() > 0 else -q)(p["q"]).sum((0, 1))


def draws(p, x, s):
    return x + vmap(lambda q: q + torch.randn_like(q), randomness="same")(p["q"]).sum((0, 1))


def writes(p, x, s):
    return x + vmap(lambda q: q.mul_(2))(p["q"]).sum((0, 1))


def pulls_back(p, x, s):
    return x + vjp(torch.sin, x)[1](x)[0]


def jacobian(p, x, s):
    return x + jacrev(torch.sin)(p["w"]).sum(0)


REFUSED = {
    reads_global: ("a tensor from outside the function is read", r"P(...)"),
    branches: ("needs the value of a tensor", "torch.where"),
    draws: ("draws random numbers", "take the noise"),
    writes: ("mul_ writes into a tensor", "bind the result"),
    pulls_back: (r"torch\.func\.vjp inside a model cannot be recorded", "torch.func.grad"),
    jacobian: (r"torch\.func\.vjp inside a model cannot be recorded", "torch.func.grad"),
}


@pytest.mark.parametrize("body", REFUSED, ids=lambda body: body.__name__)
def test_refused(body):
    match, fix = REFUSED[body]
    with pytest.raises(TraceError, match=match) as error:
        trace(model_of(body))
    assert fix in error.value.lines["fix"]
    line = body.__code__.co_firstlineno + 1
    assert str(error.value.lines["from"]).startswith(f"test_transforms.py:{line} in ")


def test_a_map_that_mixes_tokens_is_not_served():
    program = trace(model_of(lambda p, x, s: x + vmap(lambda y: y.softmax(0), 1, 1)(x)))
    with pytest.raises(LoweringError, match=r"torch\.softmax makes tokens depend") as error:
        check_tokens_apart(program)
    assert "test_transforms.py" in str(error.value.lines["from"])
