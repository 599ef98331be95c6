"""Fused matrices of checkpoints: adapters and quantised tensors of them, on the real engine.

The tensors themselves are loaded by every row of tests/models/rows that has some.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import funcmodels as fm
from funcmodels.parts import stored_tensors_of
from tests.engine.harness import serve
from tests.engine.processor import is_near, need_kernel
from tests.engine.test_lora import serve_adapters
from tests.engine.test_quantised import SCHEMES, difference
from tests.engine.test_traps import vllms_layers
from tests.engine.tiny import PROMPTS, check, expected, serve_model
from tests.models.zoo import rows

RANK, ALPHA = 8, 20


def matrices(model, weights):
    """The checkpoint's linears by their modules' names: [out, in]."""
    tensors = dict(stored_tensors_of(model.tensor_maps, dict(fm.tree.items(weights))))
    found = {name.removesuffix(".weight"): t for name, t in tensors.items() if t.dim() == 2}
    return {name: t for name, t in found.items() if re.search(r"\b(layers?|h)\.\d", name)}


def with_tensors(model, weights, tensors):
    """The weights that the checkpoint's tensors make, where these are given."""

    def value(path, param):
        map_ = model.tensor_maps[path]
        named = [name for name in map_.names if name in tensors]
        return map_.to_param([tensors[n] for n in named]) if named else values[path]

    values = dict(fm.tree.items(weights))
    return fm.tree.map_with_path(value, model.params)


def write_adapter(folder, model, weights, chosen, is_transposed=False):
    """A PEFT folder that changes the modules `chosen` matches; returns the merged weights.

    Args:
        is_transposed: whether the checkpoint has [in, out], for which PEFT has the same factors.
    """
    generator, changed, merged = torch.Generator().manual_seed(0), {}, {}
    for name, matrix in matrices(model, weights).items():
        if re.search(chosen, name):
            out, into = reversed(matrix.shape) if is_transposed else matrix.shape
            a = torch.randn(RANK, into, generator=generator) / into**0.5
            b = torch.randn(out, RANK, generator=generator) / RANK**0.5
            key = f"base_model.model.{name}"
            changed |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            delta = ALPHA / RANK * (b @ a)
            merged[f"{name}.weight"] = matrix + (delta.T if is_transposed else delta)
    assert changed, "nothing was chosen"
    targets = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in changed})
    folder.mkdir()
    save_file(changed, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    return with_tensors(model, weights, merged)


def saved_row(name, folder):
    row = rows()[name]
    model = row.model()
    weights = row.weights(model)
    fm.save(model, weights, folder)
    return model, weights


# Of phi3 queries, keys and values; of LFM2 the two gates and the input of a convolution.
FUSED = {"phi3": r"qkv_proj|gate_up_proj|o_proj", "lfm2": r"in_proj|out_proj"}


@pytest.mark.parametrize(("name", "tp"), [("phi3", 1), ("phi3", 2), ("lfm2", 1), ("lfm2", 2)])
def test_adapters_of_fused_matrices(name, tp, tmp_path):
    """Matrices in one piece each: the layer is changed as a whole."""
    model, weights = saved_row(name, tmp_path)
    merged = write_adapter(tmp_path / "a", model, weights, FUSED[name])
    want = [*expected(model, merged), *expected(model, weights)]
    adapters = [tmp_path / "a"] * len(PROMPTS) + [None] * len(PROMPTS)
    settings = rows()[name].settings
    check(serve_adapters(model, tmp_path, PROMPTS * 2, adapters, tp=tp, **settings), want)


def test_adapters_of_matrices_in_turns_are_refused(tmp_path):
    """Their rows are those of the checkpoint, which are not the layer's."""
    model, weights = saved_row("gpt_neox", tmp_path)
    write_adapter(tmp_path / "a", model, weights, "query_key_value")
    name = "gpt_neox.layers.0.attention.query_key_value"
    with pytest.raises(ValueError, match=f"this model has no {name} that an adapter could change"):
        serve_adapters(model, tmp_path, PROMPTS, [tmp_path / "a"] * 3)


def quantised(model, weights, folder, scheme, left=None):
    """Rewrite the folder's linears in a scheme; returns the weights that it stands for.

    Args:
        left: a pattern of those that stay as they are.
    """
    write, config = SCHEMES[scheme]
    tensors, meant, ignored = load_file(folder / "model.safetensors"), {}, ["embed_out"]
    for name, matrix in matrices(model, weights).items():
        if left and re.search(left, name):
            ignored.append(name)
            continue
        stored, meant[f"{name}.weight"] = write(matrix)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{kind}": part.contiguous() for kind, part in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    if left:  # experts that are one tensor are found by a pattern alone
        ignored.append(f"re:.*({left})")
    settings["quantization_config"] = config | {"ignore": [*config["ignore"], *ignored]}
    (folder / "config.json").write_text(json.dumps(settings))
    return with_tensors(model, weights, meant)


@pytest.mark.parametrize(("scheme", "tp"), [("int8", 1), ("int8", 2), ("w4a16", 2)])
def test_quantised_fused_matrices(scheme, tp, tmp_path):
    need_kernel(scheme)
    model, weights = saved_row("phi3", tmp_path)
    dtype = "bfloat16" if scheme == "w4a16" else "float32"
    if dtype == "bfloat16":
        weights = fm.tree.map(lambda w: w.bfloat16().float(), weights)
        fm.save(model, fm.tree.map(torch.Tensor.bfloat16, weights), tmp_path)
    meant = quantised(model, weights, tmp_path, scheme)
    ours = serve_model(model, tmp_path, tp=tp, dtype=dtype, edit=vllms_layers)
    options = {"prompt_logprobs": True, "tp": tp, "dtype": dtype}
    assert ours == serve(tmp_path, PROMPTS, arch="Phi3ForCausalLM", **options)
    rounded, not_rounded = (difference(ours, model, w) for w in (meant, weights))
    assert not is_near(scheme) or rounded < min(0.1, 0.9 * not_rounded)


def own(name, folder, **options):
    """What vLLM's own class answers, as something to compare with."""
    arch = rows()[name].architecture
    theirs = serve(folder, PROMPTS, arch=arch, prompt_logprobs=True, **options)
    return [(s.tokens, torch.tensor(s.all_logprobs)) for s in theirs]


def test_quantised_matrices_in_turns_by_rows(tmp_path):
    """Each row has its scale, which goes where the row goes."""
    model, weights = saved_row("falcon", tmp_path)
    quantised(model, weights, tmp_path, "int8")
    check(serve_model(model, tmp_path, tp=2), own("falcon", tmp_path, tp=2))


def test_quantised_matrices_that_cannot_be_told_apart_are_refused(tmp_path):
    """Of four bits, eight of a row in a number, the shape is that of all."""
    model, weights = saved_row("gpt_neox", tmp_path)
    quantised(model, weights, tmp_path, "w4a16")
    with pytest.raises(ValueError, match=r"query_key_value.weight holds several matrices"):
        serve_model(model, tmp_path, dtype="bfloat16")


@pytest.mark.parametrize("how", ["names", "pattern"])
def test_a_matrix_of_several_parts_that_is_left_out(how, tmp_path):
    """The layer is made for what the checkpoint has; LFM2's in_proj is three parameters here."""
    model, weights = saved_row("lfm2", tmp_path)
    quantised(model, weights, tmp_path, "int8", "in_proj")
    config = json.loads((tmp_path / "config.json").read_text())
    ignore = config["quantization_config"]["ignore"]
    ignore[:] = [name for name in ignore if name.startswith("re:") == (how == "pattern")]
    (tmp_path / "config.json").write_text(json.dumps(config))
    # Its own class is wrong with the CPU's kernel of ropes.
    native = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
    want = own("lfm2", tmp_path, **native)
    check(serve_model(model, tmp_path, edit=vllms_layers), want)
