"""Ways in which the engine gives wrong results without an error, each avoided or refused.

Each test was seen to fail with its guard removed.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import funcmodels as fm
from funcmodels.errors import FuncModelsError
from funcmodels.models import llama
from tests.engine import factories
from tests.engine.custom import custom
from tests.engine.harness import make_llm, run_in_engine, serve
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


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    model = tiny_llama()
    weights = saved(model, folder)
    return model, folder, expected(model, weights)


# 1. The CPU rotary kernel misreads heads that are a dim of their own.


def test_heads_are_flattened_before_the_rotation(tmp_path):
    """With norms between projection and rotation, heads are apart: joined again, it is right."""
    model = custom(has_qk_norm=True)
    weights = saved(model, tmp_path)
    want = expected(model, weights)

    def apart(source):
        """The emitted class without its guard."""
        return re.sub(
            r"q, k = self\.rotary_emb\(positions, \w+, \w+\)",
            "q, k = (x.flatten(1) for x in self.rotary_emb(positions, q, k))",
            source,
        )

    check(serve_model(model, tmp_path), want)
    assert distance(serve_model(model, tmp_path, edit=apart), want) > 0.01


# 3. A wrong prefix, or no packed_modules_mapping, beside a quantisation's ignore list.

IGNORED = {
    "names": [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"],
    "pattern": [r"re:.*layers\.1\.mlp\.(gate|up)_proj$"],
    "single": ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"],
}


def quantise(folder, target, ignored):
    """Write a folder as compressed-tensors has W8A8-int8: weights by channel, inputs by token."""
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        patterns = [i.removeprefix("re:") if i[:3] == "re:" else re.escape(i) for i in ignored]
        if "_proj" not in name or any(re.fullmatch(p, module) for p in patterns):
            tensors[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        tensors[f"{module}.weight_scale"] = scale
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *ignored],
    }
    (target / "config.json").write_text(json.dumps(config))


def vllms_layers(source):
    """The emitted class with vLLM's own norm and activation, to be compared bit for bit."""
    return re.sub(r"= Fast(\w+)\(", r"= \1(", source)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("ignored", IGNORED)
def test_quantised_with_an_ignore_list(ignored, tp, plain, tmp_path):
    model, folder, _ = plain
    quantise(folder, tmp_path, IGNORED[ignored])
    ours = serve_model(model, tmp_path, edit=vllms_layers, tp=tp)
    theirs = serve(tmp_path, PROMPTS, arch="LlamaForCausalLM", tp=tp, prompt_logprobs=True)
    assert ours == theirs


def test_a_quantised_folder_through_a_factory(plain, tmp_path):
    """vLLM asks the class that it loads for its fused modules, before there is a model."""
    _, folder, _ = plain
    quantise(folder, tmp_path, IGNORED["names"])
    theirs = serve(tmp_path, PROMPTS, arch="LlamaForCausalLM", prompt_logprobs=True)
    ours = serve(
        tmp_path,
        PROMPTS,
        arch="Made",
        register=lambda: fm.register(factories.unquantised, name="Made"),
        prompt_logprobs=True,
    )
    assert distance(ours, [(s.tokens, torch.tensor(s.all_logprobs)) for s in theirs]) < 0.2


@pytest.mark.parametrize("missing", ["prefix", "mapping"])
def test_without_prefix_or_mapping_quantisation_goes_wrong(missing, plain, tmp_path):
    """What the two tests above are there to see."""
    model, folder, _ = plain
    quantise(folder, tmp_path, IGNORED["names"])

    def edit(source):
        if missing == "prefix":
            return source.replace('prefix=f"{prefix}.self_attn"', 'prefix=f"{prefix}.attention"')
        return source.replace('"qkv_proj": ["q_proj", "k_proj", "v_proj"],', "")

    theirs = serve(tmp_path, PROMPTS, arch="LlamaForCausalLM", prompt_logprobs=True)
    want = [(s.tokens, torch.tensor(s.all_logprobs)) for s in theirs]
    assert distance(serve_model(model, tmp_path, edit=edit), want) > 0.2


# 4. vLLM remembers the class of a name.


@pytest.mark.parametrize(
    "how", ["class", pytest.param("string", marks=pytest.mark.slow), "factory"]
)
def test_a_second_class_under_a_used_name_is_refused(how, plain, tmp_path):
    model, folder, _ = plain
    other = tiny_llama(rope_theta=500.0)
    for name, each in (("first", model), ("second", other)):
        fm.emit(each, tmp_path / f"{name}.py")

    def run():
        import sys

        from vllm import ModelRegistry

        sys.path.insert(0, str(tmp_path))

        def serve_as(name, each, factory):
            if how == "class":
                register(each)
            elif how == "string":
                ModelRegistry.register_model(each.name, f"{name}:{each.name}")
            else:
                fm.register(factory, name=each.name)
            make_llm(folder, hf_overrides={"rope_theta": 10000.0})

        serve_as("first", model, factories.unquantised)
        serve_as("first", model, factories.unquantised)  # the same again is no harm
        serve_as("second", other, factories.other_theta)

    with pytest.raises(ValueError, match="registered again"):
        run_in_engine(run, env={"PYTHONPATH": str(tmp_path)})


# 5. Compiled graphs freeze branches on the number of tokens.


def test_branching_on_the_number_of_tokens_is_refused():
    cfg = llama.Config.from_hf(tiny_llama().hf_config)

    def forward(params, tokens, positions, segment_ids=None):
        if positions.shape[0] > 16:
            positions = positions + 1
        return llama.forward(params, tokens, positions, segment_ids, cfg=cfg)

    with pytest.raises(FuncModelsError, match="branches on the number of tokens"):
        fm.compile_to_vllm(fm.Model("Branching", cfg, llama.params(cfg), forward))


# Beside ENGINE's list: settings of config.json that the engine applies by itself.


def rewrite(folder, target, **changes):
    """A folder with another config.json."""
    config = json.loads((folder / "config.json").read_text())
    for path in folder.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path)
    (target / "config.json").write_text(json.dumps(config | changes))


def test_a_sliding_window_over_full_attention_is_refused(plain, tmp_path):
    """vLLM lays a window of config.json over every layer that has none of its own."""
    model, folder, _ = plain
    rewrite(folder, tmp_path, sliding_window=24)
    with pytest.raises(ValueError, match="sliding_window=24"):
        serve_model(model, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-2},
        {"rope_theta": 500.0},
        {"num_hidden_layers": 1},
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"hidden_act": "gelu"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_config_is_refused(change, plain, tmp_path):
    """A class is compiled for one config.json: what decides values must be the same."""
    model, folder, _ = plain
    rewrite(folder, tmp_path, **change)
    with pytest.raises(ValueError, match=f"compiled for another.*\n.*{next(iter(change))}"):
        serve_model(model, tmp_path)
