"""New weights for a running engine: what it serves afterwards is the pure function of them.

Each guard and oracle was seen to fail without what it guards.
"""

import multiprocessing
import re

import pytest
import torch

import funcmodels as fm
from funcmodels.errors import FuncModelsError
from tests.engine import factories
from tests.engine.custom import custom
from tests.engine.harness import generate, make_llm, run_in_engine
from tests.engine.odd import model as odd
from tests.engine.test_custom import MANY
from tests.engine.tiny import (
    PROMPTS,
    check,
    distance,
    expected,
    register,
    saved,
    tiny_llama,
    weights_of,
)
from tests.models.zoo import rows

CACHED = {"enable_prefix_caching": True, "block_size": 32}

MODELS = {
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "tied-padded": lambda: tiny_llama(tie_word_embeddings=True, vocab_size=260),
    "biased": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "many": lambda: custom(**MANY),
    "odd": lambda: odd,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model of MODELS saved once: name -> (model, folder, weights)."""
    made = {}

    def folder_of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = MODELS[name]()
            made[name] = model, folder, saved(model, folder)
        return made[name]

    return folder_of


def others(model, *scales):
    """Weights that the engine does not start with, and what the pure function makes of them."""
    found = [weights_of(model, scale=scale) for scale in scales]
    return found, [expected(model, weights) for weights in found]


@pytest.mark.parametrize(
    ("name", "tp", "compiled"),
    [
        ("tied", 1, False),
        ("tied", 2, False),
        ("tied-padded", 1, "trace"),
        ("tied-padded", 2, False),
        ("biased", 1, False),
        ("biased", 2, False),
        ("many", 1, False),
        ("many", 2, "trace"),
        ("odd", 1, False),
        ("odd", 2, False),
    ],
)
def test_serves_the_pushed_weights(name, tp, compiled, folders):
    """Twice in a row, and the prompts that the engine has in its prefix cache."""
    model, folder, weights = folders(name)
    new, want = others(model, 1.5, 1.1)

    def run():
        register(model)
        llm = make_llm(folder, tp=tp, compiled=compiled, **CACHED)
        generate(llm, PROMPTS, max_tokens=1)
        served = [generate(llm, PROMPTS)]
        assert served[0][2].num_cached_tokens == 64
        for each in new:
            fm.push_weights(llm, each)
            served.append(generate(llm, PROMPTS))
        return served

    served = run_in_engine(run, compiled=compiled)
    assert [answer[2].num_cached_tokens for answer in served] == [64, 0, 0]
    for answers, wanted in zip(served, [expected(model, weights), *want], strict=True):
        check(answers, wanted)


@pytest.mark.parametrize("tp", [1, 2])
def test_what_is_kept_of_a_parameter_is_computed_anew(tp, tmp_path):
    """Of Mamba-2's A_log the engine keeps -exp(A_log), and of each vector the one in float32."""
    row = rows()["mamba2"]
    model = row.model("one group")
    weights = row.weights(model)
    fm.save(model, weights, tmp_path)
    new = fm.tree.map(lambda x: x + 0.3 * torch.randn_like(x), weights)

    def run():
        source = register(model).source
        llm = make_llm(tmp_path, tp=tp, **row.settings)
        served = [generate(llm, PROMPTS)]
        fm.push_weights(llm, new)
        return source, [*served, generate(llm, PROMPTS)]

    source, served = run_in_engine(run)
    assert "computed_loader(lambda x: -torch.exp(x.to(torch.float32))" in re.sub(
        r"\(\s+", "(", source
    )
    for answers, wanted in zip(served, [weights, new], strict=True):
        check(answers, expected(model, wanted))


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_compiled_graphs_hold_no_old_weights(tp, folders):
    """By Inductor, which keeps constants where it may."""
    model, folder, _ = folders("tied")
    [new], [want] = others(model, 1.5)

    def run():
        register(model)
        llm = make_llm(folder, tp=tp, compiled=True)
        fm.push_weights(llm, new)
        return generate(llm, PROMPTS)

    check(run_in_engine(run, compiled=True, timeout=250), want)


@pytest.mark.slow
def test_pipeline_stages(folders):
    """Each stage takes what it has layers for."""
    model, folder, _ = folders("tied")
    [new], [want] = others(model, 1.5)

    def run():
        register(model)
        stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
        llm = make_llm(folder, compiled=True, **stages)
        fm.push_weights(llm, new)
        return generate(llm, PROMPTS)

    check(run_in_engine(run, compiled=True), want)


def test_an_engine_in_a_process_of_its_own(folders):
    """Nothing but text goes there, without pickle being allowed, and nothing stays behind."""
    model, folder, _ = folders("tied")
    [new], [want] = others(model, 1.5)

    def run():
        import tempfile
        from pathlib import Path

        import psutil
        import vllm.v1.engine.utils as utils

        utils.get_mp_context = lambda: multiprocessing.get_context("fork")
        register(model)
        llm = make_llm(folder, **CACHED)
        generate(llm, PROMPTS)
        fm.push_weights(llm, new)
        left = [
            *Path("/dev/shm").glob("funcmodels-push-*"),
            *Path(tempfile.gettempdir()).glob("funcmodels-push-*"),
        ]
        served = generate(llm, PROMPTS)
        for process in psutil.Process().children(recursive=True):
            process.kill()  # or the harness would wait for them
        return type(llm.llm_engine.engine_core).__name__, left, served

    kind, left, served = run_in_engine(run, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert kind == "SyncMPClient"
    assert not left
    check(served, want)


# What is refused leaves the engine as it was.


def wrong(model, what):
    """Weights of a model with one fault."""
    weights = weights_of(model)
    q = weights["layers"][1]["attn"]["q"]
    weights["layers"][1]["attn"]["q"] = {
        "shape": lambda: q[:, :16],
        "transposed": lambda: q.transpose(0, 2),
        "dtype": lambda: q.to(torch.int8),
        "number": lambda: 1.0,
        "missing": dict,
        "extra": lambda: {"a": q, "b": q},
    }[what]()
    return weights


def attempt(act, *args):
    """The name and text of the error that a call ends with."""
    try:
        act(*args)
    except FuncModelsError as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize("tp", [1, 2])
def test_what_is_no_weights_of_the_model_is_refused(tp, folders):
    model, folder, weights = folders("biased")
    faults = ["shape", "transposed", "dtype", "number", "missing", "extra"]

    def run():
        register(model)
        llm = make_llm(folder, tp=tp)
        errors = [attempt(fm.push_weights, llm, wrong(model, fault)) for fault in faults]
        return errors, generate(llm, PROMPTS)

    errors, served = run_in_engine(run)
    for fault, error in zip(faults, errors, strict=True):
        assert error is not None, fault
        assert error[0] == "CheckpointError"
        assert "layers.1.attn.q" in error[1]
    check(served, expected(model, weights))


def test_requests_in_flight_are_refused_and_go_on(folders):
    model, folder, weights = folders("biased")
    [new], [want] = others(model, 1.5)

    def run():
        from vllm import SamplingParams

        register(model)
        llm = make_llm(folder)
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        llm.enqueue([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)
        llm.llm_engine.step()
        error = attempt(fm.push_weights, llm, new)
        [output] = llm.wait_for_completion(use_tqdm=False)
        fm.push_weights(llm, new)
        return error, list(output.outputs[0].token_ids), generate(llm, PROMPTS)

    error, tokens, served = run_in_engine(run)
    assert error[0] == "PushError"
    assert "1 unfinished" in error[1]
    assert tokens == expected(model, weights)[0][0]
    check(served, want)


def test_other_engines_are_refused(folders):
    model, folder, weights = folders("biased")

    def refused(push, edit=None, **settings):
        def run():
            if "hf_overrides" not in settings:
                register(model, edit)
            return attempt(push, make_llm(folder, **settings))

        kind, text = run_in_engine(run)
        assert kind == "PushError"
        return text

    def push(llm):
        fm.push_weights(llm, weights)

    online = {"quantization": "fp8_per_channel", "dtype": "bfloat16"}
    assert "'fp8_per_channel'" in refused(push, **online)
    assert "enable_lora" in refused(push, enable_lora=True)
    layer = "from vllm.model_executor.layers.fused_moe import fused_experts"
    experts = refused(
        push, lambda source: source.replace("import torch\n", f"import torch\n{layer}\n", 1)
    )
    assert "mixes experts" in experts
    llama = {"architectures": ["LlamaForCausalLM"]}
    assert "vllm.model_executor.models.llama" in refused(push, hf_overrides=llama)
    assert "need: a vllm.LLM" in refused(lambda llm: fm.push_weights(llm.llm_engine, weights))
    other = tiny_llama(num_hidden_layers=1)
    assert "another model" in refused(
        lambda llm: fm.push_weights(llm, weights_of(other), model=other)
    )


def test_sinks_in_float16_are_refused(tmp_path):
    """Of which vLLM would go on to use a copy that it made of the old ones."""
    model = custom(has_sinks=True)
    weights = saved(model, tmp_path, torch.float16)

    def run():
        register(model)
        return attempt(fm.push_weights, make_llm(tmp_path, dtype="float16"), weights)

    kind, text = run_in_engine(run)
    assert kind == "PushError"
    assert "attention sinks" in text


# Which model it is.


def test_the_model_behind_a_factory_is_asked_for(folders):
    model, folder, _ = folders("biased")
    [new], [want] = others(model, 1.5)

    def run():
        fm.register(factories.unquantised, name="Made")
        llm = make_llm(folder, arch="Made")
        fm.push_weights(llm, new)
        return generate(llm, PROMPTS)

    check(run_in_engine(run), want)


def test_the_model_behind_an_edited_class_must_be_given(folders):
    model, folder, _ = folders("biased")
    [new], [want] = others(model, 1.5)

    def run():
        register(model, edit=lambda source: source.replace("do not edit", "edited"))
        llm = make_llm(folder)
        error = attempt(fm.push_weights, llm, new)
        fm.push_weights(llm, new, model=model)
        return error, generate(llm, PROMPTS)

    error, served = run_in_engine(run)
    assert error[0] == "PushError"
    assert "model=model" in error[1]
    check(served, want)


# What must be seen where a guard fails.


def test_the_old_prefixes_would_be_served(folders, monkeypatch):
    """Without the reset: what the tests above are there to see."""
    model, folder, _ = folders("biased")
    [new], [want] = others(model, 1.5)

    def run():
        register(model)
        llm = make_llm(folder, **CACHED)
        generate(llm, PROMPTS)
        llm.reset_prefix_cache = lambda **_: True
        fm.push_weights(llm, new)
        return generate(llm, PROMPTS)

    served = run_in_engine(run)
    assert served[2].num_cached_tokens == 64
    assert distance(served[2:], want[2:]) > 0.01


@pytest.mark.parametrize("tp", [1, 2])
def test_an_engine_is_shut_down_when_the_update_fails_half_way(tp, folders, monkeypatch):
    """It would go on with layers of both weights."""
    model, folder, _ = folders("biased")
    [new], _ = others(model, 1.5)

    def run():
        from compiler import vllm_push

        register(model)
        llm = make_llm(folder, tp=tp)
        generate(llm, PROMPTS)
        if tp == 1:

            def tensors(*args, whole=vllm_push._tensors):
                yield from list(whole(*args))[:9]
                raise OSError("planted")

            vllm_push._tensors = tensors
        else:

            def write(model, values, folder, size, whole=vllm_push.write_tensors):
                files = whole(model, values, folder, 100_000)
                (folder / files["model.norm.weight"]).unlink()
                return files

            vllm_push.write_tensors = write
        error = attempt(fm.push_weights, llm, new)
        try:
            return error, generate(llm, PROMPTS)
        except Exception as failure:
            return error, type(failure).__name__

    error, served = run_in_engine(run)
    assert error[0] == "PushError"
    assert "shut down" in error[1]
    assert isinstance(served, str), "it goes on serving"
