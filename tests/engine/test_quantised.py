"""Quantised checkpoints: bit for bit what vLLM's own class answers, and near the pure function's.

The pure function has the weights as they are after rounding; what is left is the rounding of
activations, and of sums in bfloat16.
"""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import funcmodels as fm
from tests.engine.custom import custom
from tests.engine.harness import generate, make_llm, run_in_engine, serve
from tests.engine.processor import is_near, need_kernel
from tests.engine.test_lora import modules_of
from tests.engine.test_traps import vllms_layers
from tests.engine.tiny import PROMPTS, check, register, saved, serve_model, tiny_llama
from tests.models.zoo import rows

GROUP = 32  # inputs that share a scale, of four bits
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(values, order=tuple(range(8))):
    """Numbers below 16, eight of the last dim in an int32."""
    eights = values.to(torch.int64).unflatten(-1, (-1, 8))
    whole = torch.stack([eights[..., at] << (4 * i) for i, at in enumerate(order)]).sum(0)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)


def by_channel(weight, dtype, limit):
    """[out, in] with one scale a row: tensors, and what they stand for."""
    scale = weight.abs().amax(1, keepdim=True) / limit
    stored = weight / scale
    stored = (stored.round() if dtype is torch.int8 else stored).to(dtype)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def int8(weight):
    return by_channel(weight, torch.int8, 127)


def float8(weight):
    return by_channel(weight, torch.float8_e4m3fn, 448)


def in_groups(weight, dtype, asymmetric=False):
    """[out, in] as numbers of four bits, with scales and zeros [out, groups], and its value."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / 15 if asymmetric else groups.abs().amax(-1) / 7
    scale = scale.to(dtype).float()
    zero = (-low / scale).round().clamp(0, 15) if asymmetric else torch.full_like(scale, 8)
    number = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    value = (number - zero[..., None]) * scale[..., None]
    return number.flatten(1), scale.to(dtype), zero, value.flatten(1)


def w4a16(weight, dtype=torch.bfloat16):
    number, scale, _, value = in_groups(weight, dtype)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": packed(number), "weight_scale": scale, "weight_shape": shape}, value


def gptq(weight, dtype=torch.bfloat16):
    number, scale, zero, value = in_groups(weight, dtype)
    tensors = {
        "qweight": packed(number).T,
        "scales": scale.T,
        "qzeros": packed(zero.T - 1),  # the format has them one lower
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return tensors, value


def awq(weight, dtype=torch.bfloat16):
    number, scale, zero, value = in_groups(weight, dtype, asymmetric=True)
    tensors = {
        "qweight": packed(number.T, AWQ_ORDER),
        "scales": scale.T,
        "qzeros": packed(zero.T, AWQ_ORDER),
    }
    return tensors, value


def compressed(form, weights, activations=None):
    """The config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    if activations:
        common = {"symmetric": True, "strategy": "token", "dynamic": True}
        group["input_activations"] = {**common, **activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "score"],
    }


EIGHT = {"num_bits": 8, "strategy": "channel"}
FOUR = {"bits": 4, "group_size": GROUP}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
SCHEMES = {
    "int8": (
        int8,
        compressed("int-quantized", {**EIGHT, "type": "int"}, {"num_bits": 8, "type": "int"}),
    ),
    "float8": (
        float8,
        compressed("float-quantized", {**EIGHT, "type": "float"}, {"num_bits": 8, "type": "float"}),
    ),
    "w4a16": (w4a16, compressed("pack-quantized", INT4)),
    "gptq": (gptq, {"quant_method": "gptq", **FOUR, "desc_act": False, "sym": True}),
    "awq": (awq, {"quant_method": "awq", **FOUR, "zero_point": True, "version": "gemm"}),
}
DTYPES = dict.fromkeys(("w4a16", "gptq", "awq"), "bfloat16")  # there is no kernel for float32
# The mean difference of log probabilities to the pure function: exact, or by rounding alone.
NEAR = {"w4a16": 0.05, "gptq": 0.05, "awq": 0.05, "int8": 0.05, "float8": 0.15}


def quantised(model, weights, folder, scheme, ignored=None):
    """Write a folder of linears in a scheme; returns the weights that it stands for.

    Args:
        ignored: a pattern of more names that are left as they are.
    """
    write, config = SCHEMES[scheme]
    dtype = getattr(torch, DTYPES.get(scheme, "float32"))
    weights = fm.tree.map(lambda w: w.to(dtype).float(), weights)
    fm.save(model, fm.tree.map(lambda w: w.to(dtype), weights), folder)
    meant = dict(fm.tree.items(weights))
    tensors = load_file(folder / "model.safetensors")
    for name, (path, sizes) in modules_of(model).items():
        if "embed" in name or "head" in name or name == "score":
            continue
        if ignored and re.match(ignored, name):
            continue
        stored, value = write(meant[path].reshape(sizes))
        meant[path] = value.reshape(meant[path].shape)
        del tensors[model.tensor_maps[path].names[0]]
        tensors |= {f"{name}.{kind}": part.contiguous() for kind, part in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    if ignored:
        config = config | {"ignore": [*config["ignore"], f"re:{ignored}"]}
    settings["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(settings))
    return fm.tree.map_with_path(lambda path, _: meant[path], weights)


def difference(served, model, weights):
    """The mean difference to the pure function, on the tokens that were served."""
    full = [[*p, *s.tokens] for p, s in zip(PROMPTS, served, strict=True)]
    pure = fm.logprobs(model, weights, full)
    pairs = zip(served, pure, strict=True)
    return torch.cat([torch.tensor(s.all_logprobs) - p for s, p in pairs]).abs().mean().item()


def check_near(scheme, served, model, meant, weights):
    """Nearer to the pure function of the rounded weights than rounding is, where the kernel is."""
    rounded, not_rounded = (difference(served, model, w) for w in (meant, weights))
    assert not is_near(scheme) or rounded < min(NEAR[scheme], not_rounded)


ON_TWO = ("int8", "float8", "w4a16", "awq")
RUNS = [*((scheme, 1) for scheme in SCHEMES), *((scheme, 2) for scheme in ON_TWO)]
STAGES = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.mark.parametrize(("scheme", "tp"), RUNS)
def test_equals_vllms_own_class(scheme, tp, tmp_path):
    """In fused layers too: q, k and v have scales of their own."""
    need_kernel(scheme)
    model = tiny_llama()
    weights = saved(model, tmp_path)
    meant = quantised(model, weights, tmp_path, scheme)
    dtype = DTYPES.get(scheme, "float32")
    options = {"tp": tp, "dtype": dtype}
    ours = serve_model(model, tmp_path, edit=vllms_layers, **options)
    theirs = serve(tmp_path, PROMPTS, arch="LlamaForCausalLM", prompt_logprobs=True, **options)
    assert ours == theirs
    check_near(scheme, ours, model, meant, weights)


def test_wrong_products_are_warned_of(monkeypatch, tmp_path):
    """Of int8 on a processor without VNNI, once and not in each layer; of float8, nothing."""
    model = tiny_llama()
    weights = saved(model, tmp_path / "plain")
    for scheme in ("int8", "float8"):
        quantised(model, weights, tmp_path / scheme, scheme)
    vnni = {"architecture": "x86_64", "avx512_vnni": False, "avx_vnni": True}
    none = vnni | {"avx_vnni": False}
    arm = none | {"architecture": "arm64"}

    def run():
        said = []
        handler = logging.Handler(logging.WARNING)
        monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
        logging.getLogger().addHandler(handler)
        register(model)
        counts = []
        for has, folder in (
            (vnni, "int8"),
            (arm, "int8"),
            (none, "plain"),
            (none, "float8"),
            (none, "int8"),
        ):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
            make_llm(tmp_path / folder)
            counts.append(len([text for text in said if "VNNI" in text]))
        return counts, said

    counts, said = run_in_engine(run)
    assert counts == [0, 0, 0, 0, 1], said
    (text,) = [text for text in said if "VNNI" in text]
    assert re.search(r"\n  got: +8 layers, as model\.layers\.0\.self_attn\.qkv_proj\n", text), text
    assert re.search(r"\n  fix: +.* float8", text)


@pytest.mark.parametrize("options", [{"compiled": "trace"}, STAGES], ids=["compiled", "stages"])
def test_compiled_and_on_two_stages(options, tmp_path):
    """As eagerly and on one stage, where it is compared with vLLM's own class."""
    model = tiny_llama()
    quantised(model, saved(model, tmp_path), tmp_path, "int8")
    alone = serve_model(model, tmp_path)
    served = serve_model(model, tmp_path, **options)
    check(served, [(s.tokens, torch.tensor(s.all_logprobs)) for s in alone])


def test_a_mixture_whose_experts_are_left_out(tmp_path):
    """Its attention is quantised, and its experts and their router are not."""
    row = rows()["qwen3_moe"]
    model = row.model(**row.no_choice)  # rounding would turn a choice
    weights = row.weights(model)
    meant = quantised(model, weights, tmp_path, "int8", ignored=r".*\.mlp\.")

    def run():
        from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

        register(model, vllms_layers)  # a last bit of a norm turns an int8
        engines = [make_llm(tmp_path, model_cls=cls) for cls in (None, Qwen3MoeForCausalLM)]
        return [generate(llm, PROMPTS, prompt_logprobs=True) for llm in engines]

    ours, theirs = run_in_engine(run)
    check(ours, [(s.tokens, torch.tensor(s.all_logprobs)) for s in theirs])
    check_near("int8", ours, model, meant, weights)


@pytest.mark.parametrize("scheme", ["int8", "float8", "w4a16"])
def test_quantised_experts_are_refused(scheme, tmp_path):
    """vLLM has kernels for them on a CPU with AMX, or another, and says so in its own words."""
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has the kernels")
    model = rows()["qwen3_moe"].model()
    settings = {**model.hf_config, "architectures": [model.name]}
    config = SCHEMES[scheme][1] | {"ignore": ["lm_head", r"re:.*\.mlp\.gate"]}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))

    def run():
        register(model)
        make_llm(tmp_path, load_format="dummy", dtype=DTYPES.get(scheme, "float32"))

    with pytest.raises(ValueError, match=r"no kernel here for the quantised experts.*\n +got: +"):
        run_in_engine(run)


@pytest.mark.parametrize("scheme", ["int8", "w4a16", "gptq"])
def test_names_of_no_published_model(scheme, tmp_path):
    """Linears are named by their paths, as the parameters are: `layers.0.attn.q.weight_packed`."""
    need_kernel(scheme)
    model = custom(activation="geglu")
    weights = saved(model, tmp_path)
    meant = quantised(model, weights, tmp_path, scheme)
    served = serve_model(model, tmp_path, dtype=DTYPES.get(scheme, "float32"))
    check_near(scheme, served, model, meant, weights)


@pytest.mark.parametrize(
    "options",
    [{"kv_cache_dtype": "fp8"}, {"quantization": "fp8_per_channel", "dtype": "bfloat16"}],
    ids=str,
)
def test_rounded_by_the_engine(options, tmp_path):
    """The cache, or the weights while they load."""
    if "kv_cache_dtype" in options:
        need_kernel("float8 cache")
    model = tiny_llama()
    weights = saved(model, tmp_path)
    ours = serve_model(model, tmp_path, edit=vllms_layers, **options)
    theirs = serve(tmp_path, PROMPTS, arch="LlamaForCausalLM", prompt_logprobs=True, **options)
    assert ours == theirs
    assert 1e-3 < difference(ours, model, weights) < 0.2
