"""A parameter for each use: what becomes of stacked, shared and twice-used parameters."""

from __future__ import annotations

import pytest
import torch
from einops import einsum

import funcmodels as fm
from compiler import layers
from compiler.comm import Simulated
from compiler.own_parameters import own_parameters
from compiler.partition import partition
from compiler.taken_apart import TakenApart
from compiler.trace import trace
from compiler.verify import verify
from compiler.vllm_target import lower_to_vllm
from funcmodels import ops
from tests.compiler.programs import TABLE, axes, inputs_of, on_ranks, small, weights_of

P = axes()
STACKED = fm.axes(layers=3, two=2, hidden=16, mlp=12, heads=4, head_dim=4)
LAYERS = range(3)


@fm.block
def mlp(p, x):
    return x + torch.tanh(ops.rms_norm(x, p["norm"], eps=1e-5) @ p["up"].T) @ p["down"].T


@fm.block
def fused(p, x):
    gate, up = p["gate_up"]
    return x + ops.swiglu(x @ gate.T, x @ up.T) @ p["down"].T


@fm.block
def twice(p, x):
    return mlp(p, mlp(p, x) * 0.5)


@fm.block
def norms(p, x):
    return ops.rms_norm(x + ops.layer_norm(x, p["norm"], eps=1e-5), p["norm"], eps=1e-5) * p["norm"]


def mlp_params(lead: str = "", P: fm.Axes = P, **hf: str) -> dict[str, fm.Param]:
    names = {"norm": "hidden", "up": "mlp hidden", "down": "hidden mlp"}
    return {k: P(f"{lead} {v}", hf=hf.get(k)) for k, v in names.items()}


def by_index(p, x):
    for i in LAYERS:
        x = mlp({k: w[i] for k, w in p["layers"].items()}, x)
    return x


def by_negative_index(p, x):
    for i in LAYERS:
        x = mlp(fm.tree.map(lambda w, i=i: w[i - 3], p["layers"]), x)
    return x


def by_unbind(p, x):
    for norm, up, down in zip(
        *(p["layers"][k].unbind(0) for k in ("norm", "up", "down")), strict=True
    ):
        x = mlp({"norm": norm, "up": up, "down": down}, x)
    return x


def by_iteration(p, x):
    for norm, up, down in zip(*(p["layers"][k] for k in ("norm", "up", "down")), strict=True):
        x = mlp({"norm": norm, "up": up, "down": down}, x)
    return x


def in_the_block(p, x):
    for i in LAYERS:
        x = fused({k: w[i] for k, w in p["layers"].items()}, x)
    return x


def with_rows(p, x):
    """An index that goes on into the element."""
    return x + sum(x[..., :1] * p["layers"]["norm"][i, :] for i in LAYERS)


def read_whole_too(p, x):
    return by_index(p, x) * p["layers"]["norm"].mean(0)


def shared(p, x):
    for _ in LAYERS:
        x = mlp(p["shared"], x)
    return x


def cycled(p, x):
    for i in range(4):
        x = mlp(p["list"][i % 2], x)
    return x


def within(p, x):
    return twice(p["shared"], x)


def many_norms(p, x):
    return norms({"norm": p["shared"]["norm"]}, x)


def stacked_and_shared(p, x):
    return by_index(p, by_index(p, x))


def tied_and_read(p, x):
    return x + torch.tanh(p["embed"].mean(0))


CASES = {
    # name -> (function, table of parameters, paths that a served model has and the model has not)
    "by index": (by_index, "stacked", {"layers.0.up", "layers.2.norm"}),
    "by negative index": (by_negative_index, "stacked", {"layers.0.up", "layers.2.norm"}),
    "by unbind": (by_unbind, "stacked", {"layers.1.down"}),
    "by iteration": (by_iteration, "stacked", {"layers.1.down"}),
    "by index, named": (by_index, "named", {"layers.1.down"}),
    "by index, one tensor": (by_index, "one tensor", {"layers.1.down"}),
    "in the block": (in_the_block, "fused", {"layers.0.gate_up.1", "layers.2.down"}),
    "with rows": (with_rows, "stacked", {"layers.0.norm"}),
    "read whole too": (read_whole_too, "stacked", {"layers.0.up"}),
    "shared": (shared, "shared", {"shared.0.up", "shared.2.norm"}),
    "cycled": (cycled, "list", {"again1_list.0.up", "again1_list.1.norm"}),
    "within": (within, "shared", {"shared.1.up"}),
    "many norms": (many_norms, "shared", {"shared.1.norm", "shared.2.norm"}),
    "stacked and shared": (stacked_and_shared, "stacked", {"layers.0.up", "again1_layers.0.up"}),
    "tied and read": (tied_and_read, "shared", {"again1_embed"}),
}
S = STACKED
TREES = {
    "stacked": lambda: {"layers": mlp_params("layers", S)},
    "named": lambda: {
        "layers": mlp_params(
            "layers", S, up="h.{layers}.up.weight", down="h.{layers}.dn.weight: mlp hidden"
        )
    },
    "one tensor": lambda: {
        "layers": mlp_params(
            "layers", S, up="all.layers.up", down="all.d.weight: layers mlp hidden"
        )
    },
    "fused": lambda: {
        "layers": {"gate_up": S("layers two mlp hidden"), "down": S("layers hidden mlp")}
    },
    "shared": lambda: {"shared": mlp_params()},
    "list": lambda: {"list": [mlp_params(), mlp_params()]},
}  # fmt: skip


def model_of(name: str) -> fm.Model:
    body, tree, _ = CASES[name]

    def forward(params, tokens, positions, segment_ids=None):
        x = body(params, ops.embed(tokens, params["embed"]))
        return ops.unembed(x, params["embed"])

    model = small(forward, TREES[tree](), TABLE)
    del model.params["head"]
    return fm.Model(model.name, None, model.params, forward, model.table)


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    model = model_of(name)
    program = own_parameters(trace(model))
    verify(program)
    assert isinstance(program.model, TakenApart)
    new = set(program.model.by_path) - set(model.by_path)
    assert CASES[name][2] <= new
    weights, (tokens, positions) = weights_of(model), inputs_of(5)
    want = model.forward(weights, tokens, positions)
    for local in (partition(program), lower_to_vllm(model)):
        for parts in (1, 2):
            for one in on_ranks(local, weights, tokens, positions, Simulated(parts)):
                torch.testing.assert_close(one, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_each_layer_has_its_own(name):
    """No two layers of a served model read one parameter, but a tied vocabulary's."""
    program = lower_to_vllm(model_of(name))
    for block in program.all():
        for node in block.graph.nodes:
            users = [u for u in node.users if u.target in (layers.linear, ops.rms_norm)]
            assert node.op != "get_attr" or len(users) < 2


@pytest.mark.parametrize("name", CASES)
def test_the_loader_hands_out_what_the_checkpoint_has(name):
    """The tables of the loader make every tensor of the served model from those that are saved."""
    model = model_of(name)
    served = own_parameters(trace(model)).model
    assert isinstance(served, TakenApart)
    weights = weights_of(model)
    saved = {}
    for path, value in fm.tree.items(weights):
        map_ = model.tensor_maps[path]
        saved |= dict(zip(map_.names, map_.from_param(value), strict=True))

    def handed(pairs):
        for tensor, value in pairs:
            if tensor in served.split:
                yield from handed(zip(served.split[tensor], value, strict=True))
            else:
                yield from ((new, value) for new in served.repeated.get(tensor, [tensor]))

    found = dict(handed(saved.items()))
    wanted = {name: p for p, m in served.tensor_maps.items() for name in m.names}
    assert set(found) == set(wanted)
    for path, value in served.of(weights).items():
        map_ = served.tensor_maps[path]
        torch.testing.assert_close(map_.to_param([found[n] for n in map_.names]), value)


def test_what_is_cut_over_ranks_is_not_taken_apart():
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for i in range(4):
            x = x + einsum(torch.tanh(x), params["w"][i], "... e, d e -> ... d").sum(
                -1, keepdim=True
            )
        return ops.unembed(x, params["head"])

    model = small(forward, {"w": P("heads head_dim hidden")}, TABLE)
    assert not isinstance(own_parameters(trace(model)).model, TakenApart)
