"""Parameters that declare a dtype keep it in the engine, and values of a dtype stay in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import einsum

import funcmodels as fm
from funcmodels import ops
from tests.engine.processor import bfloat16_tolerance
from tests.engine.tiny import check, distance, expected, serve_model, weights_of

P = fm.axes(vocab=256, hidden=128, heads=4, head_dim=32, mlp=128)
FLOAT32 = torch.float32
SHARDING = {"vocab": "tp", "heads": "tp", "mlp": "tp"}
# Of log probabilities: what the branches add to the residual sum is rounded to bfloat16.
TOLERANCE = bfloat16_tolerance(2e-3)


def layer() -> dict[str, fm.Param]:
    return {
        "norm": P("hidden", init="ones", dtype=FLOAT32),
        "q": P("heads head_dim hidden"),
        "k": P("heads head_dim hidden"),
        "v": P("heads head_dim hidden"),
        "o": P("hidden heads head_dim"),
        "mlp_norm": P("hidden", init="ones", dtype=FLOAT32),
        "mlp_bias": P("hidden", init="zeros", dtype=FLOAT32),
        "up": P("mlp hidden"),
        "down": P("hidden mlp"),
    }


@fm.block
def block(p, x, positions, segment_ids):
    """A layer on a residual sum of float32, whose products are of the weights' dtype."""
    dtype = p["q"].dtype
    h = ops.rms_norm(x, p["norm"], eps=1e-5).to(dtype)
    q, k, v = (einsum(h, p[n], "... e, h d e -> ... h d") for n in "qkv")
    q, k = ops.rope(q, k, positions, theta=1e4)
    o = ops.attention(q, k, v, segment_ids=segment_ids)
    x = x + 0.003 * einsum(o, p["o"], "... h d, e h d -> ... e").float()
    h = ops.layer_norm(x, p["mlp_norm"], p["mlp_bias"], eps=1e-5).to(dtype)
    return x + 0.003 * F.linear(F.relu(F.linear(h, p["up"])), p["down"]).float()


def forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["embed"])
    for p in params["layers"]:
        x = block(p, x, positions, segment_ids)
    return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-5), params["head"])


def wide_residuals() -> fm.Model:
    params = {
        "embed": P("vocab hidden", dtype=FLOAT32),
        "layers": [layer(), layer()],
        "norm": P("hidden", init="ones", dtype=FLOAT32),
        "head": P("vocab hidden", dtype=FLOAT32),
    }
    config = {"max_position_embeddings": 256}
    return fm.Model("WideResiduals", config, params, forward, sharding=SHARDING)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("wide"), wide_residuals()
    weights = saved_as_declared(model, folder)
    return model, folder, expected(model, weights)


def saved_as_declared(model: fm.Model, folder) -> Any:
    """A folder of bfloat16 weights, and of others where that is declared."""

    def cast(value: torch.Tensor, param: fm.Param) -> torch.Tensor:
        return value.to(param.dtype or torch.bfloat16)

    weights = fm.tree.map(cast, weights_of(model), model.params)
    fm.save(model, weights, folder)
    return weights


@pytest.mark.parametrize("how", [{}, {"tp": 2}, {"compiled": "trace"}], ids=str)
def test_declared_dtypes_are_held(how, wide):
    model, folder, want = wide
    check(serve_model(model, folder, dtype="bfloat16", **how), want, TOLERANCE)


FAULTS = {
    "norm": ("eps=1e-05, dtype=torch.float32)", "eps=1e-05)"),
    "table": ("params_dtype=torch.float32,", ""),
    "hidden states": ("head_dtype = torch.float32", "head_dtype = torch.bfloat16"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_dtype_that_is_not_held_is_seen(fault, wide):
    model, folder, want = wide
    try:
        served = serve_model(
            model, folder, dtype="bfloat16", edit=lambda source: source.replace(*FAULTS[fault])
        )
    except RuntimeError as error:  # without oneDNN's bfloat16, torch multiplies, and sees a table
        is_seen = "same dtype" in str(error)
    else:
        is_seen = distance(served, want) > 2 * TOLERANCE
    assert is_seen


def test_prompts_as_embeddings_are_refused(wide):
    model, folder, _ = wide
    with pytest.raises(ValueError, match="embeds tokens in torch"):
        serve_model(model, folder, dtype="bfloat16", enable_prompt_embeds=True)


STAGES = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}


def test_a_sum_keeps_its_dtype_from_stage_to_stage(wide):
    """Two stages answer as one does; rounded between them, the sum is another."""
    model, folder, _ = wide
    whole = serve_model(model, folder, dtype="bfloat16")
    want = [(s.tokens, torch.tensor(s.all_logprobs)) for s in whole]
    check(serve_model(model, folder, dtype="bfloat16", **STAGES), want, 1e-5)
    edit = ('"hidden_states": torch.float32', '"hidden_states": torch.bfloat16')
    rounded = serve_model(
        model, folder, dtype="bfloat16", edit=lambda source: source.replace(*edit), **STAGES
    )
    assert distance(rounded, want) > 1e-4


def test_attention_to_wider_values_is_refused(tmp_path):
    """The engine caches keys and values in its own dtype; in that of the values it is right."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        q, k, v = (einsum(x, params[n], "... e, h d e -> ... h d").float() for n in "qkv")
        o = ops.attention(*ops.rope(q, k, positions, theta=1e4), v, segment_ids=segment_ids)
        x = x + einsum(o.to(x.dtype), params["o"], "... h d, e h d -> ... e")
        return ops.unembed(ops.rms_norm(x, params["mlp_norm"], eps=1e-5), params["embed"])

    params = {**layer(), "embed": P("vocab hidden")}
    params = {name: params[name] for name in ("embed", "q", "k", "v", "o", "mlp_norm")}
    config = {"max_position_embeddings": 256, "num_hidden_layers": 1}
    sharding = {"vocab": "tp", "heads": "tp"}
    model = fm.Model("WideAttention", config, params, forward, sharding=sharding)
    weights = saved_as_declared(model, tmp_path)
    with pytest.raises(ValueError, match="attends to values of torch"):
        serve_model(model, tmp_path, dtype="bfloat16")
    exact = fm.tree.map(torch.Tensor.float, weights)
    check(serve_model(model, tmp_path, dtype="float32"), expected(model, exact))
