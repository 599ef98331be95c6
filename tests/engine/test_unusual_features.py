"""Adapters, pushed weights and pipeline stages, where parameters are stacked or shared.

What each does is the pure function of the changed weights, or is refused.
"""

from typing import Any

import pytest
import torch

import funcmodels as fm
from compiler.vllm_target import lower_to_vllm
from funcmodels import ops
from tests.engine.harness import generate, make_llm, run_in_engine
from tests.engine.test_lora import serve_adapters, write_adapter
from tests.engine.test_pipeline import attend, layer
from tests.engine.tiny import (
    PROMPTS,
    check,
    expected,
    register,
    saved,
)
from tests.engine.unusual import MODELS

LAYERS = 4
P = fm.axes(vocab=256, hidden=64, heads=2, head_dim=32, layers=LAYERS)


@fm.block
def normed(p: Any, x, positions, segment_ids):
    return attend(p, ops.rms_norm(x, p["norm"], eps=1e-5), positions, segment_ids)


def around(params: Any, tokens, positions, segment_ids, body):
    """Embedding, what `body` does, a norm that is also the first, and the head."""
    x = ops.rms_norm(ops.embed(tokens, params["embed"]), params["norm"], eps=1e-5)
    x = body(x, lambda p, x: normed(p, x, positions, segment_ids))
    return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-5), params["head"])


def stacked_forward(params, tokens, positions, segment_ids=None):
    def body(x, attend):
        for i in range(LAYERS):
            x = attend(fm.tree.map(lambda w, i=i: w[i], params["layers"]), x)
        return x

    return around(params, tokens, positions, segment_ids, body)


def again_forward(params, tokens, positions, segment_ids=None):
    """The first layer once more after the last; one of a list of one; and one by itself."""

    def body(x, attend):
        for p in params["layers"]:
            x = attend(p, x)
        x = attend(params["layers"][0], x)
        return attend(params["late"][0], attend(params["last"], x))

    return around(params, tokens, positions, segment_ids, body)


def made(forward, **layers):
    tree = {
        "embed": P("vocab hidden"),
        **layers,
        "norm": P("hidden", init="ones"),
        "head": P("vocab hidden"),
    }
    name = forward.__name__.removesuffix("_forward").title()
    config = {"max_position_embeddings": 256}
    return fm.Model(f"{name}ForCausalLM", config, tree, forward, {"heads": "tp", "vocab": "tp"})


def own():
    return {**layer(), "norm": P("hidden", init="ones")}


def stacked_own():
    matrices = {name: P("layers heads head_dim hidden") for name in "qkvo"}
    return {**matrices, "norm": P("layers hidden", init="ones")}


STACKED = made(stacked_forward, layers=stacked_own())
AGAIN = made(again_forward, layers=[own() for _ in range(LAYERS)], late=[own()], last=own())
CUT_IN_TWO = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (STACKED, CUT_IN_TWO),
        (AGAIN, {}),
        (AGAIN, CUT_IN_TWO),
        (MODELS["mapped"], CUT_IN_TWO),
        (MODELS["stacked"], {"tp": 2}),
        (MODELS["shared"], {"tp": 2}),
    ],
    ids=lambda value: getattr(value, "name", None) or "-".join(value) or "alone",
)
def test_stages_and_pushed_weights(model, options, tmp_path):
    """On every stage and rank, every element and every copy is that of the new weights."""
    weights = saved(model, tmp_path, scale=1.2)
    new = fm.tree.map(lambda weight: 0.9 * weight, weights)

    def run():
        register(model)
        llm = make_llm(tmp_path, **options)
        before = generate(llm, PROMPTS)
        fm.push_weights(llm, new)
        return before, generate(llm, PROMPTS)

    before, after = run_in_engine(run)
    check(before, expected(model, weights))
    check(after, expected(model, new))


def whole(model, parts):
    """Weights by the paths of a served model's parameters, stacked again."""
    found = dict(parts)
    for path, names in reversed(model.elements.items()):
        found[path] = torch.stack([found.pop(name) for name in names])
    return found


def test_adapters_of_stacked_matrices(tmp_path):
    """Each layer has its own, those of the gate and of other names too; in one batch with none."""
    model = MODELS["stacked"]
    weights = saved(model, tmp_path)
    served: Any = lower_to_vllm(model).model
    parts = served.of(weights)
    chosen = r"^layers\.\d\.(q|o|down|gate_up\.\d)$|^at\.[02]\.k$|^layers\.[02]\.v$"
    merged = whole(served, write_adapter(tmp_path / "a", served, parts, chosen))
    changed = fm.tree.map_with_path(lambda path, _: merged[path], weights)
    adapters = [None, tmp_path / "a", tmp_path / "a"]
    answers = serve_adapters(model, tmp_path, PROMPTS, adapters, tp=2)
    want = zip(expected(model, weights), expected(model, changed), adapters, strict=True)
    check(answers, [with_it if a else base for base, with_it, a in want])


def test_an_adapter_of_what_several_layers_use_is_refused(tmp_path):
    """It would change the first layer where it is the first, and not where it is the last."""
    weights = saved(AGAIN, tmp_path)
    write_adapter(tmp_path / "a", AGAIN, weights, r"^layers\.0\.q$")
    with pytest.raises(ValueError, match="the model uses this module in 2 places"):
        serve_adapters(AGAIN, tmp_path, PROMPTS, [tmp_path / "a"] * 3)


REFUSED = {
    "layers.q": (STACKED, "layers.0.q, layers.1.q"),
    "shared.k": (MODELS["shared"], "in 5 places"),
    "shared.0.k": (MODELS["shared"], "as the model's checkpoint does"),
}


@pytest.mark.parametrize("module", REFUSED)
def test_names_of_adapters_that_are_refused(module):
    model, message = REFUSED[module]

    def run():
        names: Any = fm.compile_to_vllm(model)
        try:
            names.hf_to_vllm_mapper.get_rename_mapper().map_name(f"{module}.lora_A.weight")
        except ValueError as error:
            return str(error)
        return ""

    assert message in run_in_engine(run)
