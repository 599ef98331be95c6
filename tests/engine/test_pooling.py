"""Embeddings and classes by the engine equal the pure function's."""

import pytest
import torch

import funcmodels as fm
from funcmodels.errors import LoweringError
from tests.engine.harness import EngineError, generate, make_llm, run_in_engine
from tests.engine.poolers import pooler
from tests.engine.test_spawned import add_tokenizer
from tests.engine.tiny import PROMPTS, register, saved, tiny_llama, weights_of

TOLERANCE = 1e-5  # of embeddings of length 1, and of probabilities, in float32


def ask(llm, prompts=PROMPTS, adapter=None):
    """What a pooling engine answers to prompts of token ids, as rows; with an adapter's folder."""
    from vllm.lora.request import LoRARequest

    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    lora = LoRARequest("adapter", 1, str(adapter)) if adapter else None
    if "embed" in llm.supported_tasks:
        outputs = llm.embed(inputs, use_tqdm=False, lora_request=lora)
        return torch.tensor([output.outputs.embedding for output in outputs])
    outputs = llm.classify(inputs, use_tqdm=False, lora_request=lora)
    return torch.tensor([output.outputs.probs for output in outputs])


def stored(model, folder):
    """Write a folder of the model, with the tokenizer that vLLM wants of one that embeds."""
    add_tokenizer(folder)
    return saved(model, folder)


def start(folder, **settings):
    """A small engine of a folder."""
    return make_llm(folder, skip_tokenizer_init=False, **settings)


def answers(model, folder, prompts=PROMPTS, *, tp=1, compiled=False, edit=None, **settings):
    """Answers of the emitted class, compiled and registered in the engine's own process."""

    def run():
        register(model, edit)
        return ask(start(folder, tp=tp, compiled=compiled, **settings), prompts)

    return run_in_engine(run, compiled=compiled)


def wanted(model, weights, prompts=PROMPTS):
    """The pure function's, of rows that differ."""
    oracle = {"embed": fm.embed, "classify": fm.classify}[model.task]
    want = oracle(model, weights, prompts)
    assert torch.pdist(want).min() > 0.01, "rows that hardly differ compare nothing"
    return want


def check(got, want, tolerance=TOLERANCE):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


CASES = {
    "embed-last": {},
    "embed-mean": {"pooling": "mean"},
    "embed-cls": {"pooling": "cls", "causal": "none"},
    "embed-raw": {"normalize": False},
    "encoder-last": {"causal": "none"},
    "encoder-mean": {"causal": "none", "pooling": "mean"},
    "encoder-window": {"causal": "none", "window": 24, "pooling": "mean"},
    "encoder-sinks": {"causal": "none", "has_sinks": True},
    "encoder-alibi": {"causal": "none", "has_alibi": True},
    "half-causal": {"causal": "some", "pooling": "mean"},
    "classify-last": {"task": "classify"},
    "classify-mean": {"task": "classify", "pooling": "mean", "causal": "none"},
    "classify-cut": {"task": "classify", "labels": 4},
    "classify-one": {"task": "classify", "labels": 1},
    "classify-raw": {"task": "classify", "normalize": False},
}


ALONE = [(case, 1) for case in CASES]
CUT = [(case, 2) for case in ("embed-mean", "encoder-window", "half-causal", "classify-cut")]


@pytest.mark.parametrize(("case", "tp"), [*ALONE, *CUT])
def test_equals_the_pure_function(case, tp, tmp_path):
    """Prompts of several lengths in one batch, the longest over several blocks of the cache."""
    model = pooler("Pooler", **CASES[case])
    weights = stored(model, tmp_path)
    tolerance = TOLERANCE if model.normalize else 1e-4
    check(answers(model, tmp_path, tp=tp), wanted(model, weights), tolerance)


@pytest.mark.parametrize("case", ["embed-last", "encoder-mean"])
def test_traced(case, tmp_path):
    model = pooler("Pooler", **CASES[case])
    weights = stored(model, tmp_path)
    check(answers(model, tmp_path, compiled="trace"), wanted(model, weights))


def test_in_chunks_and_from_the_prefix_cache(tmp_path):
    """Where the last token alone counts, vLLM may cut prompts, and take starts from the cache."""
    model = pooler("Pooler")
    weights = stored(model, tmp_path)

    def run():
        register(model)
        llm = start(
            tmp_path,
            max_num_seqs=4,
            max_num_batched_tokens=16,
            enable_chunked_prefill=True,
            enable_prefix_caching=True,
            block_size=32,
        )
        return ask(llm), ask(llm)

    first, second = run_in_engine(run)
    check(first, wanted(model, weights))
    check(second, wanted(model, weights))


@pytest.mark.parametrize("case", ["encoder-mean", "classify-cut"])
def test_new_weights_are_pushed(case, tmp_path):
    model = pooler("Pooler", **CASES[case])
    stored(model, tmp_path)
    new = weights_of(model, scale=1.5)

    def run():
        register(model)
        llm = start(tmp_path)
        ask(llm)
        fm.push_weights(llm, new)
        return ask(llm)

    check(run_in_engine(run), wanted(model, new))


FAULTS = {
    "causal": ("encoder-mean", "EncoderOnlyAttention(", "Attention("),
    "window": ("encoder-window", "per_layer_sliding_window=24", "per_layer_sliding_window=25"),
    "pooling": ("embed-mean", '"MEAN"', '"LAST"'),
    "activation": ("classify-last", "activation=PoolerClassify()", "activation=None"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, tmp_path):
    case, there, instead = FAULTS[fault]
    model = pooler("Pooler", **CASES[case])
    weights = stored(model, tmp_path)

    def edit(source):
        imported, rest = source.split("\n\n\n", 1)
        if fault == "causal":
            imported = imported.replace("import EncoderOnlyAttention", "import Attention")
        return imported + "\n\n\n" + rest.replace(there, instead)

    got = answers(model, tmp_path, edit=edit)
    assert (got - wanted(model, weights)).abs().max() > 1e-3


# A model does what it was declared for, and nothing else.


def test_a_model_that_generates_is_not_pooled(tmp_path):
    """vLLM would adapt the class, and embed by states that nobody declared."""
    model = tiny_llama()
    stored(model, tmp_path)
    with pytest.raises(ValueError, match="compiled to generate tokens"):
        answers(model, tmp_path, runner="pooling")


def test_a_model_that_pools_does_not_generate(tmp_path):
    model = pooler("Pooler")
    stored(model, tmp_path)

    def run():
        register(model)
        generate(start(tmp_path, runner="generate"), PROMPTS)

    with pytest.raises(EngineError, match="do not support `--runner generate`"):
        run_in_engine(run)


def test_another_pooling_than_the_declared_is_refused(tmp_path):
    """As of a folder that sentence-transformers wrote, or of the engine's own arguments."""
    model = pooler("Pooler")
    stored(model, tmp_path)

    def run():
        from vllm.config import PoolerConfig

        register(model)
        start(tmp_path, pooler_config=PoolerConfig(pooling_type="MEAN"))

    with pytest.raises(ValueError, match="seq_pooling_type='MEAN', compiled for 'LAST'"):
        run_in_engine(run)


def test_an_encoder_through_a_factory_is_refused(tmp_path):
    """vLLM asks the factory's class whether prompts may be cut, before there is a model."""
    model = pooler("Pooler", causal="none")
    stored(model, tmp_path)

    def run():
        import sys
        from types import ModuleType

        from compiler import vllm_plugin

        module = sys.modules["own_factory"] = ModuleType("own_factory")
        factory = module.factory = lambda hf_config, parallel: model  # pyright: ignore
        factory.__module__, factory.__qualname__ = "own_factory", "factory"
        vllm_plugin.register()
        fm.register(factory, name="Made")
        start(tmp_path, arch="Made", runner="pooling")

    with pytest.raises(ValueError, match="attn_type='decoder', compiled for 'encoder_only'"):
        run_in_engine(run)


def test_what_the_engine_has_no_kernel_for_is_refused():
    with pytest.raises(LoweringError, match=r"no softcap(.|\n)*softcap=2\.0(.|\n)*poolers\.py"):
        fm.compile_to_vllm(pooler("Pooler", causal="none", softcap=2.0))
    with pytest.raises(LoweringError, match=r"not causal(.|\n)*poolers"):
        fm.compile_to_vllm(pooler("Pooler", task="generate", pooling=None, causal="none"))
