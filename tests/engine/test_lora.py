"""LoRA adapters from PEFT folders: served, they equal the pure function with merged weights."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file

import funcmodels as fm
from compiler.vllm_target import source_for_vllm
from tests.engine.custom import Config, custom, params
from tests.engine.harness import generate, make_llm, run_in_engine
from tests.engine.tiny import PROMPTS, check, distance, expected, register, saved, tiny_llama

RANK, ALPHA = 8, 20
OPTIONS = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16}


def modules_of(model):
    """The matrices of a model, by their modules' names in the checkpoint: path, and [out, in]."""
    found = {}
    for path, param in model.by_path.items():
        name = model.tensor_maps[path].names[0].removesuffix(".weight")
        if len(param.shape) > 1 and not name.endswith(".bias"):
            leaf = path.rpartition(".")[2]
            outs = {"o": 1}.get(leaf, len(param.shape) - 1)
            sizes = math.prod(param.shape[:outs]), math.prod(param.shape[outs:])
            found[name] = (path, sizes)
    return found


def write_adapter(folder, model, weights, chosen, *, seed=0, rank=RANK, rename=None):
    """A PEFT folder that changes the modules `chosen` matches; returns the merged weights."""
    generator = torch.Generator().manual_seed(seed)
    merged, tensors = dict(fm.tree.items(weights)), {}
    for name, (path, (out, into)) in modules_of(model).items():
        if not re.search(chosen, name):
            continue
        a = torch.randn(rank, into, generator=generator) / into**0.5
        b = torch.randn(out, rank, generator=generator) / rank**0.5
        key = f"base_model.model.{rename(name) if rename else name}"
        if "embed" in name:  # PEFT has the factors of an embedding the other way around
            a, b = b.T.contiguous(), a.T.contiguous()
            tensors |= {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}
            delta = (b @ a).T
        else:
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            delta = b @ a
        merged[path] = merged[path] + ALPHA / rank * delta.reshape(merged[path].shape)
    assert tensors, "nothing was chosen"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    return fm.tree.map_with_path(lambda path, _: merged[path], weights)


def serve_adapters(model, folder, prompts, adapters, *, edit=None, compiled=False, **options):
    """Answers to prompts, each with its adapter's folder or None, in one batch."""

    def run():
        register(model, edit)
        llm = make_llm(folder, compiled=compiled, **{**OPTIONS, **options})
        return generate(llm, prompts, adapters=adapters)

    return run_in_engine(run, compiled=compiled)


@pytest.fixture(scope="module", params=["llama", "llama-tied", "custom"])
def adapted(request, tmp_path_factory):
    """A model, its folder, two adapters' folders, and what is expected of it with each and none."""
    folder = tmp_path_factory.mktemp(request.param)
    make = {
        "llama": lambda: tiny_llama(attention_bias=True, vocab_size=251),
        "llama-tied": lambda: tiny_llama(tie_word_embeddings=True),
        "custom": lambda: custom(vocab_size=251, has_qk_norm=True, final_softcap=5.0),
    }
    model = make[request.param]()
    weights = saved(model, folder)
    pure = model
    if request.param == "llama-tied":  # adapters change the embedding and the head apart
        pure, weights = tiny_llama(), {**weights, "head": weights["embed"]}
    everything = write_adapter(folder / "all", pure, weights, ".", seed=1)
    # Parts of fused layers, of one layer of several, and of another rank.
    chosen = r"0\.(self_)?attn\.(q|v)|1\.(self_)?attn\.(k|o)|0\.mlp\.up|1\.mlp\.(gate|down)"
    some = write_adapter(folder / "some", pure, weights, chosen, seed=2, rank=16)
    adapters = {None: weights, folder / "all": everything, folder / "some": some}
    want = {adapter: expected(pure, merged) for adapter, merged in adapters.items()}
    return model, folder, want


@pytest.mark.parametrize(("tp", "compiled"), [(1, False), (2, False), (1, "trace")])
def test_mixed_batch_equals_merged_weights(adapted, tp, compiled):
    """Every linear, the embedding and the head; requests with either adapter and with none."""
    model, folder, want = adapted
    adapters = [adapter for adapter in want for _ in PROMPTS]
    served = serve_adapters(model, folder, PROMPTS * len(want), adapters, tp=tp, compiled=compiled)
    check(served, [answer for answers in want.values() for answer in answers])


def test_without_the_empty_slot_requests_get_an_adapter_they_did_not_ask_for(adapted):
    """The trap: on a CPU, vLLM reads the last adapter for requests without one."""
    model, folder, want = adapted
    adapters = [adapter for adapter in want for _ in PROMPTS]

    def edit(source):
        return source.replace("if current_platform.is_cpu() else ()", "if False else ()")

    served = serve_adapters(model, folder, PROMPTS * len(want), adapters, edit=edit)
    assert distance(served[: len(PROMPTS)], want[None]) > 0.01


WRONG = {
    "layer": lambda name: name.replace("layers.1", "layers.7"),
    "place": lambda name: name.replace("model.layers", "transformer.layers"),
    "module": lambda name: name.replace("o_proj", "out_proj"),
    "not-a-linear": lambda name: name.replace("self_attn.o_proj", "input_layernorm"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_adapter_for_another_model_is_refused(wrong, tmp_path):
    """vLLM looks at the last part of a name only, and serves without what it finds no place for."""
    model = tiny_llama()
    weights = saved(model, tmp_path)
    write_adapter(tmp_path / "a", model, weights, r"1\.self_attn\.o", rename=WRONG[wrong])
    name = WRONG[wrong]("model.layers.1.self_attn.o_proj")
    with pytest.raises(ValueError, match=f"this model has no {name} that an adapter could change"):
        serve_adapters(model, tmp_path, PROMPTS, [tmp_path / "a"] * 3)


@pytest.mark.parametrize("wrong", ["layer", "place"])
def test_without_the_check_a_wrong_adapter_changes_nothing(wrong, tmp_path):
    model = tiny_llama()
    weights = saved(model, tmp_path)
    want = expected(model, weights)
    write_adapter(tmp_path / "a", model, weights, r"1\.self_attn\.o", rename=WRONG[wrong])

    def edit(source):
        return source.replace("if of_adapter and module not in", "if not module not in")

    check(serve_adapters(model, tmp_path, PROMPTS, [tmp_path / "a"] * 3, edit=edit), want)


def test_parts_of_a_fused_layer_that_end_alike(tmp_path):
    """`attn.q.proj` and `attn.k.proj` are told apart as the function's own parameters are."""
    tree, base = params(Config()), custom()
    P = fm.axes(heads=4, kv_heads=2, head_dim=32, hidden=128)
    for block in tree["layers"]:
        for name, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
            at = f"layers.{{layers}}.attn.{name}.proj.weight: ({heads} head_dim) hidden"
            block["attn"][name] = P(f"{heads} head_dim hidden", hf=at)
    model = fm.Model("EndAlike", base.config, tree, base.forward, base.sharding)
    weights = saved(model, tmp_path)
    merged = write_adapter(tmp_path / "a", model, weights, r"[01]\.attn\.(q|v)")
    served = serve_adapters(model, tmp_path, PROMPTS, [tmp_path / "a"] * 3, tp=2)
    check(served, expected(model, merged))


def test_a_matrix_stored_in_another_order_is_no_target():
    """The rows of an adapter's factors would lie otherwise than those of the layer."""
    config = Config()
    tree = params(config)
    P = fm.axes(heads=4, kv_heads=2, head_dim=32, hidden=128)
    tree["layers"][0]["attn"]["q"] = P("heads head_dim hidden", hf="q0: (head_dim heads) hidden")
    tree["layers"][0]["attn"]["k"] = P(
        "kv_heads head_dim hidden", hf="k0: hidden kv_heads head_dim"
    )
    model = custom()
    source = source_for_vllm(
        fm.Model(model.name, config, tree, model.forward, sharding=model.sharding)
    )
    namespace: dict = {"LAYERS": 4}
    exec(source[source.index("LORA_TARGETS") : source.index("class ")], namespace)
    assert "k0" in namespace["LORA_TARGETS"]
    assert "q0" not in namespace["LORA_TARGETS"]
