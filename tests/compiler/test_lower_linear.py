"""Products in whatever layout they are written: the layer they become, and the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch.func import vmap

import funcmodels as fm
from compiler import layers
from compiler.comm import Simulated
from compiler.ir import Program
from compiler.partition import partition
from compiler.passes import run_passes
from compiler.passes.lower_linear import why_no_linear
from compiler.trace import trace
from compiler.vllm_target import source_for_vllm
from funcmodels import ops
from tests.compiler.programs import allowed, axes, inputs_of, on_ranks, small, weights_of

P = axes()
WIDE = fm.axes(q=16, hidden=16, heads=4, one_head=4, head_dim=4, kv=8, one=1, two=2)
PARAMS = {
    "q": P("heads head_dim hidden"),
    "qt": P("hidden heads head_dim"),
    "o": P("hidden heads head_dim"),
    "ot": P("heads head_dim hidden"),
    "up": P("mlp hidden"),
    "upt": P("hidden mlp"),
    "down": P("hidden mlp"),
    "wide": WIDE("q hidden"),
    "wide_o": WIDE("hidden q"),
    "bias": P("mlp"),
    "out": P("hidden"),
    "norm": P("hidden"),
    "small": WIDE("head_dim one_head"),
    "turned": P("hidden head_dim heads"),
}
TABLE: dict[str, str | None] = {"vocab": "tp", "heads": "tp", "mlp": "tp", "q": "tp"}


def heads(x: Any, p: Any) -> Any:
    return einsum(x, p["q"], "... e, h d e -> ... h d")


def tanh_up(x: Any, p: Any) -> Any:
    return torch.tanh(x @ p["up"].T)


# name -> (of x and p, kinds of the layers that it becomes)
FORMS: dict[str, tuple[Any, list[str] | None]] = {
    "einsum": (
        lambda x, p: einsum(heads(x, p), p["o"], "... h d, e h d -> ... e"), ["column", "row"]),
    "parameter first": (
        lambda x, p: einsum(p["o"], heads(x, p), "e h d, ... h d -> ... e"), ["column", "row"]),
    "flattened": (
        lambda x, p: heads(x, p).flatten(-2) @ p["o"].flatten(1).T, ["column", "row"]),
    "rearranged": (
        lambda x, p: rearrange(heads(x, p), "... h d -> ... (h d)")
        @ rearrange(p["o"], "e h d -> (h d) e"), ["column", "row"]),
    "rearranged in": (
        lambda x, p: (x @ rearrange(p["q"], "h d e -> e (h d)")).unflatten(-1, (4, 4)).flatten(-2)
        @ p["ot"].flatten(0, 1), ["column", "row"]),
    "reshaped": (
        lambda x, p: F.linear(F.linear(x, p["q"].reshape(16, 16)), p["o"].reshape(16, 16)),
        ["column", "row"]),
    "permuted": (
        lambda x, p: torch.einsum("thd,hde->te", torch.einsum("te,ehd->thd", x, p["qt"]),
                                  p["o"].permute(1, 2, 0)), ["column", "row"]),
    "split": (
        lambda x, p: einsum(einsum(x, p["wide"].unflatten(0, (4, 4)), "... e, h d e -> ... h d"),
                            rearrange(p["wide_o"], "e (h d) -> h d e", h=4),
                            "... h d, h d e -> ... e"), ["column", "row"]),
    "one dim more": (
        lambda x, p: F.linear(tanh_up(x, p), p["down"].unsqueeze(0).squeeze(0)),
        ["column", "row"]),
    "left": (lambda x, p: (p["up"] @ x.T).T.tanh() @ p["down"].T, ["column", "row"]),
    "left of rows": (lambda x, p: tanh_up(x, p) @ p["down"].T, ["column", "row"]),
    "stored [in, out]": (lambda x, p: (x @ p["upt"]).tanh() @ p["down"].mT, ["column", "row"]),
    "vmap": (
        lambda x, p: einsum(vmap(lambda q: F.linear(x, q), out_dims=-2)(p["q"]), p["o"],
                            "... h d, e h d -> ... e"), ["column", "row"]),
    "vmap of transposed": (
        lambda x, p: einsum(vmap(lambda q: x @ q, in_dims=1)(p["qt"]), p["o"],
                            "h t d, e h d -> t e"), ["column", "row"]),
    "summed, and a bias": (
        lambda x, p: F.linear(F.linear(x, p["up"], p["bias"]).tanh(), p["down"], p["out"]),
        ["column", "row"]),
    "addmm": (
        lambda x, p: torch.addmm(p["out"], torch.addmm(p["bias"], x, p["up"].T), p["down"].T),
        ["column", "row"]),
    "tensordot": (
        lambda x, p: torch.tensordot(torch.tensordot(x, p["q"], ([1], [2])), p["ot"], 2),  # type: ignore[arg-type]
        ["column", "row"]),
    "rows of another order": (
        lambda x, p: rearrange(heads(x, p), "... h d -> ... (d h)")
        @ rearrange(p["turned"], "e d h -> (d h) e"), None),
    "for each head": (lambda x, p: (heads(x, p) @ p["small"]).flatten(-2) @ p["ot"].flatten(0, 1),
        ["column", "row"]),
    "one number": (
        lambda x, p: einsum(x, p["out"], "... e, e -> ...")[..., None] * x, ["replicated"]),
    "one number, cut": (
        lambda x, p: einsum(tanh_up(x, p), p["bias"], "... f, f -> ...")[..., None] * x,
        ["column", "row_partial"]),
    "used twice": (lambda x, p: (x @ p["up"].T).tanh() @ p["up"], []),
    "used elsewhere": (lambda x, p: tanh_up(x, p) @ p["down"].T + p["down"].sum(-1), ["column"]),
    "bias used elsewhere": (
        lambda x, p: F.linear(F.linear(x, p["up"], p["bias"]) * p["bias"], p["down"]), ["row"]),
    "sum used elsewhere": (
        lambda x, p: F.linear((F.linear(x, p["up"]) + p["bias"]) * p["bias"], p["down"]),
        ["column", "row"]),
    "one beside many": (
        lambda x, p: torch.einsum("tb,ab->ta", x[:, :1], p["up"]) @ p["up"], []),
    "sliced": (lambda x, p: x @ p["wide"][:, :8].T.repeat(2, 1), []),
    "low rank before": (lambda x, p: x @ (p["up"].T @ p["down"].T), []),
    "scaled before": (lambda x, p: x @ (p["up"] * 2).T @ p["down"].T, ["row"]),
}  # fmt: skip


def program_of(name: str) -> tuple[fm.Model, Program]:
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.rms_norm(ops.embed(tokens, params["embed"]), params["norm"], eps=1e-5)
        y = FORMS[name][0](x, params)
        return ops.unembed(ops.rms_norm(x + y, params["norm"], eps=1e-5), params["head"])

    model = small(forward, PARAMS, TABLE)
    return model, trace(model)


def kinds_of(program: Program) -> list[str]:
    nodes = [n for b in program.all() for n in b.graph.nodes if n.target is layers.linear]
    return [str(n.kwargs["kind"]) for n in nodes]


@pytest.mark.parametrize("name", FORMS)
def test_form(name):
    model, program = program_of(name)
    local = partition(program)
    lowered = run_passes(local)
    want = FORMS[name][1]
    if want is not None:
        assert kinds_of(lowered) == want
    if want == ["column", "row"]:
        assert not local.gathered
    weights, (tokens, positions) = weights_of(model), inputs_of(5)
    expected = model.forward(weights, tokens, positions)
    for parts in (1, 2, 4):
        assert allowed(local, parts)
        for one in on_ranks(lowered, weights, tokens, positions, Simulated(parts)):
            torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_emitted(name):
    compile(source_for_vllm(program_of(name)[0]), "emitted.py", "exec")


REASONS = {
    "for each head": "several rows of each token",
    "low rank before": "no product of one activation and one matrix",
    "sliced": "no product of one activation and one matrix",
}


@pytest.mark.parametrize("name", REASONS)
def test_why_no_linear(name):
    program = program_of(name)[1]
    nodes = [n for n in program.root.graph.nodes if n.target is torch.matmul]
    assert any(REASONS[name] in str(why_no_linear(node)) for node in nodes)
