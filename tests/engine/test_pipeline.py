"""Pipeline stages, eager and compiled, with tensor parallelism and adapters; models without."""

import pytest
import torch

import funcmodels as fm
from funcmodels import ops
from tests.engine.custom import custom
from tests.engine.harness import generate, make_llm, run_in_engine
from tests.engine.rereading import model as rereading
from tests.engine.test_lora import OPTIONS, write_adapter
from tests.engine.test_value_residual import model as value_residual
from tests.engine.tiny import (
    PROMPTS,
    check,
    distance,
    expected,
    register,
    saved,
    serve_model,
    tiny_llama,
)
from tests.engine.unusual import stacked

STAGES = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
MODELS = {
    "llama": lambda: tiny_llama(num_hidden_layers=3),
    "tied": lambda: tiny_llama(tie_word_embeddings=True, vocab_size=251),
    "custom": lambda: custom(local_window=24, has_sinks=True, positions="learned"),
}


@pytest.mark.parametrize(("kind", "tp"), [("llama", 1), ("llama", 2), ("tied", 2), ("custom", 1)])
def test_two_stages(kind, tp, tmp_path):
    """Eagerly; on a CPU the engine itself cannot, without what the class does for it."""
    model = MODELS[kind]()
    weights = saved(model, tmp_path)
    check(serve_model(model, tmp_path, tp=tp, **STAGES), expected(model, weights))


def test_adapters_over_stages(tmp_path):
    model = MODELS["llama"]()
    weights = saved(model, tmp_path)
    merged = write_adapter(tmp_path / "all", model, weights, ".")
    adapters = [None, tmp_path / "all", tmp_path / "all"]

    def run():
        register(model)
        return generate(make_llm(tmp_path, **OPTIONS, **STAGES), PROMPTS, adapters=adapters)

    wanted = zip(expected(model, weights), expected(model, merged), adapters, strict=True)
    check(run_in_engine(run), [with_it if a else base for base, with_it, a in wanted])


def skipping(params, tokens, positions, segment_ids=None):
    """A U-net: what the first layers make is added again, scaled, in the last ones."""
    x = ops.embed(tokens, params["embed"])
    gain, kept = torch.sigmoid(params["gain"]), []
    for i, p in enumerate(params["layers"]):
        x = x if i < 2 else x + kept.pop() * gain
        x = attend(p, x, positions, segment_ids)
        kept += [x] if i < 2 else []
    return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-5), params["head"])


def from_first(params, tokens, positions, segment_ids=None):
    """Every layer reads the embeddings, and what comes of the positions."""
    x = first = ops.embed(tokens, params["embed"])
    even = (positions % 2 == 0).unsqueeze(-1)
    for p in params["layers"]:
        x = attend_to_both(p, torch.where(even, x, x / 2), first, positions, segment_ids)
    return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-5), params["head"])


def returning(params, tokens, positions, segment_ids=None):
    """What the first layer holds is read after the last one."""
    x = ops.embed(tokens, params["embed"])
    for i, p in enumerate(params["layers"]):
        x = attend(p, x, positions, segment_ids) * (p["gain"] if i % 2 == 0 else 1.0)
    x = x * params["layers"][0]["gain"]
    return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-5), params["head"])


def two_lists(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["embed"])
    for p in params["layers"]:
        x = attend(p, x, positions, segment_ids)
    for p in params["late"]:
        x = attend(p, x, positions, segment_ids)
    return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-5), params["head"])


P = fm.axes(vocab=256, hidden=64, heads=2, head_dim=32)


@fm.block
def attend(p, x, positions, segment_ids):
    q, k, v = (torch.einsum("...e,hde->...hd", x, p[name]) for name in "qkv")
    q, k = ops.rope(q, k, positions, theta=1e4)
    return x + torch.einsum(
        "...hd,hde->...e", ops.attention(q, k, v, segment_ids=segment_ids), p["o"]
    )


@fm.block
def attend_to_both(p, x, first, positions, segment_ids):
    return attend(p, x + first, positions, segment_ids)


def layer():
    return {**{name: P("heads head_dim hidden") for name in "qkv"}, "o": P("heads head_dim hidden")}


def uncut(forward):
    tree = {
        "embed": P("vocab hidden"),
        "layers": [layer() for _ in range(4)],
        "norm": P("hidden", init="ones"),
        "head": P("vocab hidden"),
    }
    tree |= {"late": [layer(), layer()]} if forward is two_lists else {}
    tree |= {"gain": P("hidden")} if forward is skipping else {}
    if forward is returning:
        tree["layers"] = [{**own, "gain": P("hidden", init="ones")} for own in tree["layers"]]
    return fm.Model("Uncut", {"max_position_embeddings": 256}, tree, forward, {"heads": "tp"})


CARRYING = {
    "skipping": lambda: uncut(skipping),
    "from_first": lambda: uncut(from_first),
    "value_residual": lambda: value_residual,
    "shared_keys": lambda: stacked,
    "rereading": lambda: rereading,
}


@pytest.mark.parametrize(
    ("kind", "tp", "stages", "compiled"),
    [
        ("skipping", 1, 2, False),
        ("skipping", 1, 4, False),
        pytest.param("from_first", 1, 2, True, marks=pytest.mark.slow),
        ("value_residual", 2, 2, False),
        ("shared_keys", 2, 2, False),
        ("rereading", 1, 2, False),
    ],
)
def test_stages_that_send_on_more_than_one_value(kind, tp, stages, compiled, tmp_path):
    """From early layers to late ones; of keys and values each rank has its heads."""
    model = CARRYING[kind]()
    weights = saved(model, tmp_path)
    settings = {**STAGES, "pipeline_parallel_size": stages}
    check(
        serve_model(model, tmp_path, tp=tp, compiled=compiled, **settings), expected(model, weights)
    )


@pytest.mark.parametrize("kind", ["skipping", "shared_keys"])
def test_a_value_that_is_not_sent_is_seen(kind, tmp_path):
    """The next stage has zeros in its place, or the heads of another rank."""
    model = CARRYING[kind]()
    weights = saved(model, tmp_path)
    fault = {
        "skipping": ("found[name] = x if", "found[name] = x * 0 if name != 'x' else x if"),
        "shared_keys": ("get_tensor_model_parallel_rank() * width", "0"),
    }[kind]
    served = serve_model(
        model,
        tmp_path,
        tp=2 if kind == "shared_keys" else 1,
        edit=lambda source: source.replace(*fault),
        **STAGES,
    )
    assert distance(served, expected(model, weights)) > 1e-3


REASONS = {
    returning: "what is made at test_pipeline.py:",
    two_lists: "its layers are in several lists: layers, late",
}


@pytest.mark.parametrize("forward", REASONS)
def test_what_cannot_be_cut_is_refused(forward, tmp_path):
    """It says why; in one stage it is served."""
    model = uncut(forward)
    weights = saved(model, tmp_path, scale=1.3)
    check(serve_model(model, tmp_path), expected(model, weights))
    # vLLM's error names no cause; the worker's output, which the harness keeps, does.
    said = f"this model cannot be cut into 2 pipeline stages: {REASONS[forward]}"
    with pytest.raises(Exception, match=r"failed|died|Failed") as error:
        serve_model(model, tmp_path, **STAGES)
    assert said in str(error.value) + "".join(error.value.__notes__)
