"""Recurrences on the real engine equal the pure function, whatever else is in the batch."""

import pytest
import torch

import funcmodels as fm
from funcmodels.errors import FuncModelsError
from tests.engine.harness import engine_model, generate, make_llm, run_in_engine
from tests.engine.recurrences import recurrent_model
from tests.engine.tiny import check, expected, register, saved, serve_model

MODELS = {
    "linear": ("linear",),
    "own": ("own", "own"),
    "conv": ("conv", "conv"),
    "ssd": ("ssd", "conv", "ssd"),
    "of all kinds": ("conv", "delta", "attention", "own"),
}
OPTIONS = {"enable_prefix_caching": False}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_pure_function(name, tp, tmp_path):
    model = recurrent_model(*MODELS[name])
    weights = saved(model, tmp_path)
    check(serve_model(model, tmp_path, tp=tp, **OPTIONS), expected(model, weights))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A model of all kinds, and what is expected of it for prompts of 1 to 300 tokens."""
    folder = tmp_path_factory.mktemp("recurrent")
    model = recurrent_model(*MODELS["of all kinds"])
    weights = saved(model, folder)
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 2, 31, 32, 33, 64, 100, 300)
    prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]
    return model, folder, prompts, expected(model, weights, prompts)


@pytest.mark.parametrize("budget", [None, 37, 16])
def test_prompts_of_many_lengths_in_one_batch(many, budget):
    """With a budget, prompts are cut at whatever token is the last that a step has room for."""
    model, folder, prompts, want = many
    options = {"max_num_batched_tokens": budget, "enable_chunked_prefill": True} if budget else {}
    served = serve_model(model, folder, prompts, max_model_len=512, **OPTIONS, **options)
    check(served, want)


@pytest.mark.parametrize("tp", [1, 2])
def test_compiled(many, tp):
    model, folder, prompts, want = many
    served = serve_model(
        model, folder, prompts, tp=tp, compiled="trace", max_model_len=512, **OPTIONS
    )
    check(served, want)


STAGED = ("delta", "linear", "own")
IN_TURNS = ("conv", "attention", "delta", "attention")  # some are given positions, others are not


@pytest.mark.parametrize(("kinds", "tp"), [(STAGED, 1), (STAGED, 2), (IN_TURNS, 1)])
def test_two_stages(kinds, tp, tmp_path):
    """Each stage has both, or states alone: the engine has one layout of caches for all stages."""
    model = recurrent_model(*kinds)
    weights = saved(model, tmp_path)
    stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    check(serve_model(model, tmp_path, tp=tp, **OPTIONS, **stages), expected(model, weights))


def test_no_state_of_another_request_is_seen(many):
    """Places in the cache hold NaN, then what earlier and aborted requests have left in them."""
    model, folder, prompts, want = many

    def run():
        register(model)
        llm = make_llm(folder, max_model_len=512, max_num_seqs=4, **OPTIONS)
        poisoned = 0
        for layer in engine_model(llm).modules():
            for cache in getattr(layer, "kv_cache", ()) if hasattr(layer, "run_chunks") else ():
                cache.fill_(torch.nan)
                poisoned += 1
        first = generate(llm, prompts, prompt_logprobs=True)
        engine = llm.llm_engine
        from vllm import SamplingParams

        for i, prompt in enumerate(prompts):
            engine.add_request(
                f"lost-{i}", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=50)
            )
        for _ in range(3):
            engine.step()
        engine.abort_request([f"lost-{i}" for i in range(len(prompts))])
        return poisoned, first, generate(llm, prompts, prompt_logprobs=True)

    poisoned, first, second = run_in_engine(run)
    assert poisoned == 4  # of three layers, one of which has two tensors
    check(first, want)
    check(second, want)


def test_a_planted_fault_is_seen(many):
    """A state that is not begun anew."""
    model, folder, prompts, want = many

    def run():
        def plant(source):
            assert "cache[batch.new] = init" in source
            return source.replace("cache[batch.new] = init", "pass")

        register(model, plant)
        llm = make_llm(folder, max_model_len=512, max_num_seqs=4, **OPTIONS)
        generate(llm, prompts)
        return generate(llm, prompts, prompt_logprobs=True)

    served = run_in_engine(run)
    with pytest.raises(AssertionError):
        check(served, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_prefix_caching": True}, "prefix caching keeps no state of"),
        (
            {
                **OPTIONS,
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 2,
                },
            },
            "cannot take back tokens",
        ),
    ],
)
def test_what_a_state_cannot_follow_is_refused(many, options, message):
    model, folder, prompts, _ = many
    with pytest.raises(ValueError, match=message):
        serve_model(model, folder, prompts[:1], max_model_len=512, **options)


def test_heads_that_ranks_do_not_divide(many):
    model, *_ = many
    with pytest.raises(FuncModelsError, match=r"heads|inner"):
        fm.check(model, tp=3)
