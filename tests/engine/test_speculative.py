"""Speculative decoding: with n-grams, and with a draft model of ours, the tokens are the same."""

import pytest

import funcmodels as fm
from tests.engine.custom import custom
from tests.engine.harness import generate, make_llm, run_in_engine
from tests.engine.tiny import PROMPTS, check, expected, register, saved, tiny_llama

# Beside the usual ones, a prompt that repeats itself: n-grams find something to propose.
REPEATING = [*PROMPTS, [5, 6, 7, 8] * 6]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A Llama, its folder, and its answers without speculation."""
    folder = tmp_path_factory.mktemp("target")
    model = tiny_llama()
    weights = saved(model, folder)
    return model, folder, weights, expected(model, weights, REPEATING, max_tokens=24)


def speculate(models, folder, speculation, *, compiled=False, **options):
    """Answers to the prompts, and how many tokens were proposed and accepted."""

    def run():
        for model in models:
            register(model)
        options["compiled"] = compiled
        llm = make_llm(folder, speculative_config=speculation, disable_log_stats=False, **options)
        answers = generate(llm, REPEATING, max_tokens=24)
        counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
        kinds = ("num_draft_tokens", "num_accepted_tokens")
        return answers, *(counts[f"vllm:spec_decode_{kind}"] for kind in kinds)

    return run_in_engine(run, compiled=compiled)


@pytest.mark.parametrize(("tp", "compiled"), [(1, False), (2, False), (1, "trace")])
def test_ngrams(tp, compiled, target):
    model, folder, _, want = target
    served, proposed, accepted = speculate([model], folder, NGRAM, tp=tp, compiled=compiled)
    check(served, want)
    assert 0 < accepted < proposed


@pytest.mark.parametrize(("kind", "tp"), [("itself", 1), ("itself", 2), ("another", 1)])
def test_a_draft_model(kind, tp, target, tmp_path):
    """The draft is a class of ours too, beside the target in one engine, under another name."""
    model, folder, weights, want = target
    if kind == "itself":
        draft = fm.Model("Draft", model.config, model.params, model.forward, model.sharding)
        fm.save(draft, weights, tmp_path)
    else:
        draft = custom()
        saved(draft, tmp_path)
    speculation = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3}
    served, proposed, accepted = speculate([model, draft], folder, speculation, tp=tp)
    check(served, want)
    assert proposed > 0
    assert accepted == proposed if kind == "itself" else accepted < proposed
