"""What vLLM asks of a model class: found by name, inspected, built from a config, and loaded."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import funcmodels as fm
from tests.engine.harness import generate, make_llm, run_in_engine
from tests.engine.tiny import (
    PROMPTS,
    check,
    distance,
    expected,
    register,
    saved,
    serve_model,
    tiny_llama,
    weights_of,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    model = tiny_llama()
    weights = saved(model, folder)
    return model, folder, expected(model, weights)


def engine_config(folder, **settings):
    """The VllmConfig of a folder."""
    from vllm.engine.arg_utils import EngineArgs

    defaults = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    return EngineArgs(model=str(folder), **{**defaults, **settings}).create_engine_config()


def built(folder, **settings):
    """The registered model of a folder, built as a worker does, without weights."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model

    config = engine_config(folder, **settings)
    with set_current_vllm_config(config):
        store = "tcp://127.0.0.1:0"
        init_distributed_environment(1, 0, store, 0, backend="gloo")
        initialize_model_parallel(1, 1)
        return initialize_model(config)


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("how", ["class", pytest.param("string", marks=pytest.mark.slow)])
def test_found_and_inspected(how, plain, tmp_path):
    """By class object, and by the string that names an emitted file's class."""
    model, folder, _ = plain
    fm.emit(model, tmp_path / "served_llama.py")

    def inspect():
        from vllm import ModelRegistry

        if how == "class":
            register(model)
        else:
            sys.path.insert(0, str(tmp_path))
            ModelRegistry.register_model(model.name, f"served_llama:{model.name}")
        assert model.name in ModelRegistry.get_supported_archs()
        config = engine_config(folder).model_config
        info, name = ModelRegistry.inspect_model_cls(config.architectures, config)
        cls, resolved = ModelRegistry.resolve_model_cls(config.architectures, config)
        assert resolved == name == config.architecture
        assert cls.__name__ == name
        return name, config.runner_type, info, hasattr(cls, "compiled_by")

    # The string is inspected in a process of its own, which reads sys.path from the environment.
    name, runner, info, is_ours = run_in_engine(inspect, env={"PYTHONPATH": str(tmp_path)})
    assert (name, runner, is_ours) == (model.name, "generate", True)
    assert info.is_text_generation_model
    assert info.supports_pp
    assert not info.is_pooling_model
    assert not info.is_hybrid
    assert not info.supports_multimodal


def test_flags(plain):
    model, _, _ = plain

    def flags():
        from vllm.model_executor.models import interfaces, interfaces_base

        cls = fm.compile_to_vllm(model)
        return (
            interfaces.supports_lora(cls),
            interfaces.supports_pp(cls),
            interfaces_base.is_vllm_model(cls),
            interfaces_base.is_text_generation_model(cls),
        )

    assert run_in_engine(flags) == (True, True, True, True)


def test_module_tree_follows_the_checkpoint(plain):
    """Built from a VllmConfig: layers and parameters named as vLLM's own class names them."""
    model, folder, _ = plain

    def names(arch):
        register(model)
        vllms = built(folder, hf_overrides={"architectures": [arch]})
        return sorted((n, tuple(p.shape)) for n, p in vllms.named_parameters())

    ours = run_in_engine(names, model.name)
    assert ours == run_in_engine(names, "LlamaForCausalLM")


def test_loads_weights_given_by_name(plain):
    """The same tensors whichever way they come: in any order, from an iterator."""
    model, folder, want = plain

    def run():
        register(model)
        llm = make_llm(folder, load_format="dummy")
        pairs = list(tensors(folder).items())[::-1]
        kwargs = {"weights_iterator": pairs}
        llm.collective_rpc("reload_weights", kwargs=kwargs)
        return generate(llm, PROMPTS, prompt_logprobs=True)

    check(run_in_engine(run), want)


MISSING = [
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_refused(name, plain, tmp_path):
    """Also a part of a fused parameter, which vLLM's own classes leave as it was allocated."""
    model, folder, _ = plain
    broken(folder, tmp_path, drop=name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        serve_model(model, tmp_path)


def test_an_unexpected_tensor_is_refused(plain, tmp_path):
    model, folder, _ = plain
    extra = "model.layers.0.self_attn.q_norm.weight"
    broken(folder, tmp_path, add={extra: torch.ones(32)})
    with pytest.raises(ValueError, match="q_norm"):
        serve_model(model, tmp_path)


def test_a_misshaped_tensor_is_refused(plain, tmp_path):
    model, folder, _ = plain
    broken(folder, tmp_path, add={"model.norm.weight": torch.ones(64)})
    with pytest.raises(Exception, match=r"64|model\.norm"):
        serve_model(model, tmp_path)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tied_head_may_be_stored_twice(tp, tmp_path):
    """The second copy is passed over, as it is in training."""
    model = tiny_llama(tie_word_embeddings=True)
    weights = saved(model, tmp_path)
    broken(tmp_path, tmp_path, add={"lm_head.weight": weights["embed"].clone()})
    check(serve_model(model, tmp_path, tp=tp), expected(model, weights))


def test_a_head_that_is_not_the_embedding_is_refused(tmp_path):
    """A config that ties what the checkpoint does not: vLLM's own class would not notice."""
    model = tiny_llama(tie_word_embeddings=True)
    weights = saved(model, tmp_path)
    broken(tmp_path, tmp_path, add={"lm_head.weight": weights["embed"] + 1})
    with pytest.raises(Exception, match="is not the tensor that it is tied to"):
        serve_model(model, tmp_path)


def test_old_rotary_tables_are_passed_over(plain, tmp_path):
    model, folder, want = plain
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    broken(folder, tmp_path, add={name: torch.ones(16)})
    check(serve_model(model, tmp_path), want)


@pytest.mark.parametrize("tp", [1, 2])
def test_reloaded_weights_are_exact(tp, plain):
    """Trap: reloading corrupts some models, and old prefixes are served until they are reset."""
    model, folder, _ = plain
    other = weights_of(model, scale=1.5)
    want = expected(model, other)

    def run():
        register(model)
        llm = make_llm(folder, tp=tp, enable_prefix_caching=True, block_size=32)
        generate(llm, PROMPTS)
        pairs = [
            (name, tensor)
            for path, value in fm.tree.items(other)
            for name, tensor in zip(
                model.tensor_maps[path].names,
                model.tensor_maps[path].from_param(value),
                strict=True,
            )
        ]
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
        stale = generate(llm, PROMPTS)
        assert llm.reset_prefix_cache()
        return stale, generate(llm, PROMPTS)

    stale, served = run_in_engine(run)
    assert stale[2].num_cached_tokens == 64
    assert distance(stale[2:], want[2:]) > 0.01
    check(served, want)


def broken(folder, target, *, drop=None, add=None):
    """Copy a folder with a tensor dropped or added."""
    found = {n: t for n, t in tensors(folder).items() if n != drop}
    assert drop is None or len(found) < len(tensors(folder))
    config = (folder / "config.json").read_text()
    (target / "config.json").write_text(config)
    save_file({**found, **(add or {})}, target / "model.safetensors", metadata={"format": "pt"})
