"""Mixtures of experts: the layer that they become, the same values, and how they are loaded."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import funcmodels as fm
from compiler import collectives, layers
from compiler.comm import Simulated
from compiler.modules import plan_modules
from compiler.partition import partition
from compiler.passes import run_passes
from compiler.split import split_at_unembedding
from compiler.trace import trace
from compiler.vllm_target import lower_to_vllm, source_for_vllm
from funcmodels import ops
from funcmodels.errors import LoweringError
from tests.compiler.programs import inputs_of, on_ranks, small, weights_of

EXPERTS, WIDTH = 6, 12
P = fm.axes(hidden=16, experts=EXPERTS, width=WIDTH, mlp=12)
NAME = "model.experts.{experts}"
OAI: dict[str, Any] = {"activation": "swigluoai", "alpha": 1.702, "limit": 7.0}
TABLE: dict[str, str | None] = {"vocab": "tp", "width": "tp", "mlp": "tp", "experts": "ep"}
MATRICES = {
    "router": P("experts hidden"),
    "gate": P("experts width hidden"),
    "up": P("experts width hidden"),
    "down": P("experts hidden width"),
}
BIASES = {
    "gate_bias": P("experts width"),
    "up_bias": P("experts width"),
    "down_bias": P("experts hidden"),
}
SHARED = {"shared_up": P("mlp hidden"), "shared_down": P("hidden mlp")}


def mixed(p: Any, x: torch.Tensor, **settings: Any) -> torch.Tensor:
    weights, ids = torch.topk((x @ p["router"].T).softmax(-1), 2, dim=-1)
    biases = {name: p[name] for name in BIASES if name in p}
    settings = biases | (settings or {"activation": "silu"})
    return ops.experts(x, weights, ids, p["gate"], p["up"], p["down"], **settings)


def shared(p: Any, x: torch.Tensor) -> torch.Tensor:
    """Summed with another layer before the sum over ranks is taken."""
    return mixed(p, x) + torch.relu(x @ p["shared_up"].T) @ p["shared_down"].T


FORMS = {
    "plain": (mixed, MATRICES, TABLE, "row"),
    "biases": (lambda p, x: mixed(p, x, **OAI), MATRICES | BIASES, TABLE, "row"),
    "one bias": (mixed, MATRICES | {"down_bias": BIASES["down_bias"]}, TABLE, "row"),
    "shared": (shared, MATRICES | SHARED, TABLE, "row_partial"),
    "whole": (mixed, MATRICES, {"vocab": "tp"}, "replicated"),
}


def model_of(fn: Any, params: Any, table: Any = None) -> fm.Model:
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        return ops.unembed(x + torch.tanh(fn(params, x)), params["head"])

    return small(forward, params, TABLE if table is None else table)


@pytest.mark.parametrize("form", FORMS)
def test_becomes_a_layer_of_the_same_values(form):
    fn, params, table, kind = FORMS[form]
    model = model_of(fn, params, table)
    weights, (tokens, positions) = weights_of(model), inputs_of(9)
    want = model.forward(weights, tokens, positions)
    program = run_passes(partition(trace(model), "tp"))
    found = [n for n in program.root.graph.nodes if n.target is layers.experts]
    assert [n.kwargs["kind"] for n in found] == [kind]
    assert not any(n.target is ops.experts for n in program.root.graph.nodes)
    for parts in (1, 2, 3):
        for got in on_ranks(program, weights, tokens, positions, Simulated(parts)):
            torch.testing.assert_close(got, want)


def test_one_sum_over_ranks_for_routed_and_shared_experts():
    program = lower_to_vllm(model_of(shared, MATRICES | SHARED))
    sums = [n for n in program.root.graph.nodes if n.target is collectives.all_reduce]
    assert len(sums) == 1
    source = source_for_vllm(model_of(shared, MATRICES | SHARED))
    assert source.count("reduce_results=False") == 2
    assert source.count("= tensor_model_parallel_all_reduce(") == 1
    assert "is_summed=False" in source


STORED = {
    "one by one": {
        "gate": P("experts width hidden", hf=f"{NAME}.w1.weight"),
        "up": P("experts width hidden", hf=f"{NAME}.w3.weight"),
        "down": P("experts hidden width", hf=f"{NAME}.w2.weight: width hidden"),
    },
    "all in one": {
        "gate": P("experts width hidden", hf="moe.gates: experts hidden width"),
        "up": P("experts width hidden", hf="moe.ups"),
        "down": P("experts hidden width", hf="moe.downs"),
    },
    "by path": {n: MATRICES[n] for n in ("gate", "up", "down")},
    "in turns": {
        "gate": P("experts width hidden", hf="moe.gate_up: experts hidden width[0:1/2]"),
        "up": P("experts width hidden", hf="moe.gate_up: experts hidden width[1:2/2]"),
        "down": P("experts hidden width", hf="moe.down: experts width hidden"),
    },
}


@pytest.mark.parametrize("stored", STORED)
def test_every_tensor_goes_to_its_expert(stored):
    """Under the names by which vLLM's layer loads one expert after another."""
    params = {"router": P("experts hidden", hf="router.weight")} | STORED[stored]
    program = lower_to_vllm(model_of(mixed, params))
    plan = plan_modules(program, split_at_unembedding(program))
    leaves = ("w1", "w3", "w2") if stored == "one by one" else ("gate_proj", "up_proj", "down_proj")
    found = [to.param for to in plan.tensors.values() if ".experts." in to.param]
    want = {f"{leaf}.{e}" for leaf in leaves for e in range(EXPERTS)}
    parts = [re.fullmatch(r"[\w.]*experts\.(\d+)\.(\w+)\.weight", name) for name in found]
    assert {f"{m[2]}.{m[1]}" for m in parts if m} == want
    assert len(found) == len(want)
    source = source_for_vllm(model_of(mixed, params))
    assert ('ckpt_names=("w1", "w2", "w3")' in source) == (stored == "one by one")
    assert ("EXPERT_TENSORS" in source) == (stored != "one by one")


def test_what_cannot_be_the_engines_layer_is_refused():
    def half(p, x):
        return mixed(p | {"gate": 0.5 * p["gate"]}, x)

    with pytest.raises(LoweringError, match=r"no parameter of its own\n +got: +mul, a value"):
        lower_to_vllm(model_of(half, MATRICES))

    def twice(p, x):
        return mixed(p, x) + p["down"].sum()

    with pytest.raises(LoweringError, match=r"got: +down, used elsewhere too(.|\n)*test_experts"):
        lower_to_vllm(model_of(twice, MATRICES))

    with pytest.raises(LoweringError, match=r'fix: +sharding=\{"mlp": "tp", "experts": "ep"\}'):
        lower_to_vllm(model_of(mixed, MATRICES, {"vocab": "tp", "experts": "tp"}))

    def other(p, x):
        return mixed(p, x, **OAI | {"limit": 5.0})

    with pytest.raises(LoweringError, match=r"got: +alpha=1.702, limit=5.0"):
        lower_to_vllm(model_of(other, MATRICES))

    def rows(p, x):
        return mixed(p, x.unsqueeze(-2)).squeeze(-2)

    with pytest.raises(LoweringError, match=r"several rows of each token"):
        lower_to_vllm(model_of(rows, MATRICES))

    across = MATRICES | {"gate": P("experts width hidden", hf="moe.gate: width experts hidden")}
    with pytest.raises(LoweringError, match=r'need: +"experts" first'):
        source_for_vllm(model_of(mixed, across))
