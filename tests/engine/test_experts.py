"""Mixtures of experts on the real engine: any routing, pushed weights, and what is refused."""

from __future__ import annotations

import pytest

import funcmodels as fm
from tests.engine import mixtures
from tests.engine.harness import generate, make_llm, run_in_engine
from tests.engine.tiny import PROMPTS, check, distance, expected, register, saved, weights_of

RUNS = [(kind, tp) for kind in mixtures.KINDS for tp in (1, 2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder_of(kind):
        if kind not in made:
            model, folder = mixtures.model(kind), tmp_path_factory.mktemp("mixture")
            made[kind] = model, folder, saved(model, folder)
        return made[kind]

    return folder_of


@pytest.mark.parametrize(("kind", "tp"), RUNS)
def test_serves_first_and_pushed_weights(kind, tp, folders):
    """Once eagerly and, on two ranks, traced by Dynamo; and once more the weights of the start."""
    model, folder, weights = folders(kind)
    other = weights_of(model, scale=1.1)
    compiled = "trace" if tp == 2 and "shared" in kind else False

    def run():
        register(model)
        llm = make_llm(folder, tp=tp, compiled=compiled)
        served = [generate(llm, PROMPTS, prompt_logprobs=True)]
        for each in (other, weights):
            fm.push_weights(llm, each)
            served.append(generate(llm, PROMPTS, prompt_logprobs=True))
        return served

    begun, pushed, again = run_in_engine(run, compiled=compiled)
    want = expected(model, weights)
    check(begun, want)
    check(pushed, expected(model, other))
    check(again, want)
    assert distance(pushed, want) > 1e-2


def failure(folder, model, **options):
    """What the engine says when it does not start."""

    def run():
        register(model)
        try:
            make_llm(folder, **options)
        except Exception as error:
            return str(error)
        return "it started"

    return run_in_engine(run)


def test_expert_parallelism_is_refused_on_a_cpu(folders):
    """vLLM's kernel crashes there."""
    model, folder, _ = folders("gelu, one")
    message = failure(folder, model, enable_expert_parallel=True)
    assert "crash on a CPU when they are divided" in message
    assert "fix:  enable_expert_parallel=False" in message


def test_adapters_are_refused_on_a_cpu(folders):
    """vLLM takes a Triton kernel for the experts, even where no adapter is for them."""
    model, folder, _ = folders("gelu, one")
    message = failure(folder, model, enable_lora=True)
    assert "no kernel for experts beside LoRA adapters on a CPU" in message


def test_sizes_that_the_kernel_lacks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(mixtures, "P", fm.axes(**{**dict(mixtures.SIZES), "hidden": 48}))
    odd = mixtures.model("whole")
    saved(odd, tmp_path)
    assert "got:  hidden 48\n" in failure(tmp_path, odd)
