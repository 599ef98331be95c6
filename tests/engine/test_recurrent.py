"""Recurrences on the real engine equal the pure function, whatever else is in the batch."""

import pytest
import torch

import funcmodels as fm
from funcmodels.errors import FuncModelsError
from tests.engine.harness import engine_model, generate, make_llm, run_in_engine
from tests.engine.recurrences import loose_model, recurrent_model
from tests.engine.test_zoo import NOISE, excess
from tests.engine.tiny import PROMPTS, check, expected, register, saved, serve_model
from tests.models.zoo import rows

MODELS = {
    "linear": ("linear",),
    "own": ("own", "scanned", "own"),
    "conv": ("conv", "odd", "conv"),
    "ssd": ("ssd", "conv", "ssd"),
    "of all kinds": ("conv", "delta", "attention", "own"),
    "of others": ("ssd", "by_key", "attention", "linear"),  # of which one has two recurrences
}
OPTIONS = {"enable_prefix_caching": False}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "of others"])
def test_equals_the_pure_function(name, tp, tmp_path):
    model = recurrent_model(*MODELS[name])
    weights = saved(model, tmp_path)
    check(serve_model(model, tmp_path, tp=tp, **OPTIONS), expected(model, weights))


def test_outside_of_a_list_of_layers(tmp_path):
    """The engine tells layers apart by the number in their names, and these have none."""
    model = loose_model()
    weights = saved(model, tmp_path)
    check(serve_model(model, tmp_path, tp=2, **OPTIONS), expected(model, weights))


@pytest.fixture(scope="module")
def many(tmp_path_factory, request):
    """A model of all kinds, and what is expected of it for prompts of 1 to 300 tokens."""
    folder = tmp_path_factory.mktemp("recurrent")
    model = recurrent_model(*MODELS[getattr(request, "param", "of all kinds")])
    weights = saved(model, folder)
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 2, 31, 32, 33, 64, 100, 300)
    prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]
    return model, folder, prompts, expected(model, weights, prompts)


BOTH = pytest.mark.parametrize("many", ["of all kinds", "of others"], indirect=True)


@pytest.mark.parametrize("budget", [None, 16])
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_by_inductor(many):
    """By the compiler of code, which the others leave out."""
    model, folder, prompts, want = many
    served = serve_model(
        model, folder, prompts, compiled=True, max_model_len=512, timeout=800, **OPTIONS
    )
    check(served, want)


STAGED = ("delta", "linear", "own")
IN_TURNS = ("conv", "attention", "delta", "attention")  # some are given positions, others are not
APART = ("conv", "delta", "attention", "attention")


@pytest.mark.parametrize(("kinds", "tp"), [(STAGED, 2), (IN_TURNS, 1), (APART, 1)])
def test_two_stages(kinds, tp, tmp_path):
    """Of states alone, of both, and of one kind each: all stages have the engine's one layout."""
    model = recurrent_model(*kinds)
    weights = saved(model, tmp_path)
    stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    check(serve_model(model, tmp_path, tp=tp, **OPTIONS, **stages), expected(model, weights))


def states_of(llm):
    """The engine's tensors of states, one place of each for a request."""
    layers = [m for m in engine_model(llm).modules() if hasattr(m, "run_chunks")]
    return [states for layer in layers for states in layer.states]


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


@BOTH
def test_cut_at_every_token(many):
    """A prompt is cut after each of its tokens in turn, and after each as many again."""
    model, folder, _, _ = many
    prompt = torch.randint(256, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    weights = fm.load(model, folder)
    [(tokens, logprobs)] = expected(model, weights, [prompt], max_tokens=1)

    def run():
        register(model)
        llm = make_llm(folder, **OPTIONS)
        found = []
        for budget in range(1, len(prompt)):
            scheduler_of(llm).max_num_scheduled_tokens = budget
            found += generate(llm, [prompt], max_tokens=1, prompt_logprobs=True)
        return found

    served = run_in_engine(run)
    check(served, [(tokens, logprobs)] * len(served))


@BOTH
@pytest.mark.parametrize("cached", [False, True])
def test_a_request_that_is_preempted_begins_anew(many, cached):
    """The cache has no room for the last tokens of all. Places that are given up are poisoned.

    With a cache of prefixes, their states in it are kept.
    """
    model, folder, *_ = many
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in (60, 61, 62, 63)]
    want = expected(model, fm.load(model, folder), prompts)

    def run():
        register(model)
        llm = make_llm(
            folder,
            block_size=32,
            max_num_seqs=4,
            num_gpu_blocks_override=22,  # 5 a request and one that is never used; 6 at last
            enable_prefix_caching=cached,
        )
        scheduler = scheduler_of(llm)
        preempt, preempted = scheduler._preempt_request, []

        def spoil(request, *args, **kwargs):
            ids = scheduler.kv_cache_manager.get_block_ids(request.request_id)
            preempted.append(request.request_id)
            if not cached:
                for states in states_of(llm):
                    states[[i for group in ids for i in group]] = torch.nan
            return preempt(request, *args, **kwargs)

        scheduler._preempt_request = spoil
        return preempted, generate(llm, prompts)

    preempted, served = run_in_engine(run)
    assert preempted
    check(served, want)


@BOTH
def test_no_state_of_another_request_is_seen(many):
    """Places in the cache hold NaN, then what earlier and aborted requests have left in them."""
    model, folder, prompts, want = many

    def run():
        register(model)
        llm = make_llm(folder, max_model_len=512, max_num_seqs=4, **OPTIONS)
        poisoned = 0
        for states in states_of(llm):
            states.fill_(torch.nan)
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
    assert poisoned == 4  # of three layers, one of which has two
    check(first, want)
    check(second, want)


def not_begun(source):
    """A fault: new requests find what is in their places."""
    assert "cache[batch.new] = init" in source
    return source.replace("cache[batch.new] = init", "pass")


def test_a_planted_fault_is_seen(many):
    """A state that is not begun anew."""
    model, folder, prompts, want = many

    def run():
        register(model, not_begun)
        llm = make_llm(folder, max_model_len=512, max_num_seqs=4, **OPTIONS)
        generate(llm, prompts)
        return generate(llm, prompts, prompt_logprobs=True)

    served = run_in_engine(run)
    with pytest.raises(AssertionError):
        check(served, want)


def test_a_kernel_that_takes_bfloat16_alone(tmp_path):
    """The delta rule of 64 features: prompts are cut anywhere, and places hold NaN or old states.

    Each time the engine is as near to float32 as the pure function in bfloat16 is.
    """
    row = rows()["qwen3_next"]
    model = row.model(**row.no_choice)
    weights = row.weights(model, torch.bfloat16)
    fm.save(model, weights, tmp_path)

    def run(edit, *budgets):
        assert "DeltaRuleKernel" in register(model, edit).source
        llm = make_llm(tmp_path, dtype="bfloat16", max_num_seqs=4, **OPTIONS)
        found, places = [], states_of(llm)
        for states in places:
            states.fill_(torch.nan)
        for budget in budgets:
            scheduler_of(llm).max_num_scheduled_tokens = budget
            found.append(generate(llm, PROMPTS, prompt_logprobs=True))
        return len(places), found

    exact = fm.tree.map(torch.Tensor.float, weights)
    places, found = run_in_engine(run, None, 256, 1, 7, 63, 64, 65)
    assert places
    assert all(excess(model, exact, weights, served) < NOISE for served in found)
    _, [faulty] = run_in_engine(run, not_begun, 256)
    assert not excess(model, exact, weights, faulty) < NOISE


def serve_twice(model, folder, prompts, tp=1, edit=None):
    """Answers to all prompts, then to the same and to others that begin like them."""

    def run():
        register(model, edit)
        llm = make_llm(
            folder,
            tp=tp,
            block_size=32,
            max_model_len=512,
            max_num_seqs=4,
            enable_prefix_caching=True,
        )
        return generate(llm, prompts), generate(llm, [*prompts, *others_like(prompts)])

    return run_in_engine(run)


def others_like(prompts):
    return [[*prompt[: len(prompt) - 5], 9, 8, 7] for prompt in prompts if len(prompt) > 40]


@pytest.mark.parametrize(
    ("many", "tp"),
    [("of all kinds", 1), ("of all kinds", 2), ("of others", 1)],
    indirect=["many"],
)
def test_a_cached_prefix(many, tp):
    """A request goes on from the states that another has left in the cache."""
    model, folder, prompts, want = many
    want = [*want, *expected(model, fm.load(model, folder), others_like(prompts))]
    first, second = serve_twice(model, folder, prompts, tp)
    check(first, want[: len(first)])
    check(second, want)
    assert not any(answer.num_cached_tokens for answer in first)
    found = [answer.num_cached_tokens for answer in second]
    assert found[: len(first)] == [(len(p) - 1) // 32 * 32 for p in prompts]
    assert any(found[len(first) :]), "no prompt has gone on from a state of another one"


def test_a_cached_prefix_without_its_states_is_seen(many):
    model, folder, prompts, want = many

    def plant(source):
        assert "pages[:, :at]," in source
        return source.replace("pages[:, :at],", "pages[:, :0],")

    _, second = serve_twice(model, folder, prompts, edit=plant)
    with pytest.raises(AssertionError):
        check(second, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
    with pytest.raises(FuncModelsError, match=r"(?s)(heads|inner).*from: .*recurrences\.py:\d+"):
        fm.check(model, tp=3)
