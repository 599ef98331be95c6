"""The harness itself, on vLLM's own Llama class: it tells the truth, and it fails well."""

import os
import time
from pathlib import Path

import pytest
import torch

from tests.engine.harness import EngineError, engine_model, generate, make_llm, run_in_engine, serve

PROMPTS = [[1, 17, 200, 5, 9, 33, 7], [3, 4, 5], [250, *range(60, 120)]]
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama whose logits are far from ties."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=256,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(folder):
    """Greedy tokens and log probabilities by transformers, float32, eager."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    rows = []
    for prompt in PROMPTS:
        ids, count = list(prompt), len(prompt)
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            logits = model(torch.tensor([ids])).logits[0, :-1]
        picked = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert logits.std() > 0.5, "near-zero logits compare nothing"
        rows.append((ids[count:], picked[: count - 1], picked[count - 1 :]))
    return rows


def check(served, expected, *, with_prompt=True):
    for answer, (tokens, prompt_logprobs, logprobs) in zip(served, expected, strict=True):
        assert answer.tokens == tokens
        torch.testing.assert_close(torch.tensor(answer.logprobs), logprobs, rtol=0, atol=TOLERANCE)
        if with_prompt:
            got = torch.tensor(answer.prompt_logprobs)
            torch.testing.assert_close(got, prompt_logprobs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_equals_transformers(folder, expected, tp):
    check(serve(folder, PROMPTS, tp=tp, prompt_logprobs=True), expected)


def test_chunked_prefill(folder, expected):
    served = serve(folder, PROMPTS, prompt_logprobs=True, max_num_seqs=4, max_num_batched_tokens=16)
    check(served, expected)


def test_prefix_caching(folder, expected):
    served = serve(
        folder,
        PROMPTS,
        warm_prompts=[PROMPTS[2][:-4]],
        enable_prefix_caching=True,
        block_size=32,
    )
    assert [answer.num_cached_tokens for answer in served] == [0, 0, 32]
    check(served, expected, with_prompt=False)


@pytest.mark.parametrize("tp", [1, 2])
def test_traced(folder, expected, tp):
    check(serve(folder, PROMPTS, tp=tp, compiled="trace", prompt_logprobs=True), expected)


@pytest.mark.slow
def test_compiled(folder, expected):
    check(serve(folder, PROMPTS, compiled=True, prompt_logprobs=True), expected)


@pytest.mark.parametrize("compiled", ["trace", False])
def test_compiled_means_compiled(folder, compiled):
    """Dynamo has seen the model's forward exactly when asked to, and broke no graph."""

    def count_graphs():
        from torch._dynamo.utils import counters

        generate(make_llm(folder, compiled=compiled), [[1, 2, 3]])
        return counters["stats"]["unique_graphs"], dict(counters["graph_break"])

    graphs, breaks = run_in_engine(count_graphs, compiled=compiled)
    assert bool(graphs) == bool(compiled)
    assert breaks == {}


def test_dummy_weights_need_only_a_config(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    [answer] = serve(tmp_path, [[1, 2, 3]], load_format="dummy")
    assert len(answer.tokens) == 8


def test_registers_a_class_made_in_the_test(folder, expected):
    """The class exists nowhere but here; the fork carries it into the worker too."""
    calls = []

    def run():
        from vllm.model_executor.models.llama import LlamaForCausalLM

        class Local(LlamaForCausalLM):
            pass

        llm = make_llm(folder, model_cls=Local)
        return type(engine_model(llm)).__name__, calls.append(1)

    assert run_in_engine(run)[0] == "Local"
    assert calls == [], "the child must not reach into the test process"


def test_raises_what_the_child_raised():
    def fail():
        raise KeyError("this very key")

    with pytest.raises(KeyError, match="this very key") as info:
        run_in_engine(fail)
    assert "in fail" in info.value.__notes__[0]


def test_an_error_that_does_not_pickle_arrives_as_text():
    class LocalError(Exception):
        pass

    def fail():
        raise LocalError("local trouble")

    with pytest.raises(EngineError, match="LocalError: local trouble"):
        run_in_engine(fail)


def test_a_timeout_kills_the_child_and_shows_its_output():
    def hang():
        print("about to hang")
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(EngineError, match=r"(?s)no answer.*about to hang"):
        run_in_engine(hang, timeout=1)
    assert time.monotonic() - start < 30


def test_an_error_is_shown_without_the_news_before_it():
    def fail():
        print("(Worker pid=1) INFO 11-24 03:27:06 [model.py:1] resolved")
        print("(Worker pid=1) ERROR 11-24 03:27:06 [worker.py:1] failed to start")
        raise ValueError("no workers")

    with pytest.raises(ValueError, match="no workers") as error:
        run_in_engine(fail)
    [note] = error.value.__notes__
    assert "failed to start" in note
    assert "[model.py:1]" not in note


def test_a_crash_is_reported():
    with pytest.raises(EngineError, match="died with status 3"):
        run_in_engine(lambda: os._exit(3))


def test_an_answer_is_there_before_the_workers_have_ended():
    def run():
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        return "answer"

    start = time.monotonic()
    assert run_in_engine(run) == "answer"
    assert time.monotonic() - start < 30


def test_leaves_nothing_behind(folder):
    def run():
        from vllm.v1.executor import multiproc_executor

        generate(make_llm(folder, tp=2), [[1, 2, 3]])
        rendezvous = Path(multiproc_executor.get_file_store_init_method().removeprefix("file://"))
        return rendezvous, list(Path("/dev/shm").glob(f"{rendezvous.name}-*"))

    environment = dict(os.environ)
    rendezvous, in_use = run_in_engine(run)
    assert in_use, "the engine's shared memory has other names; nothing was looked for"
    assert not any(path.exists() for path in [rendezvous, *in_use])
    assert dict(os.environ) == environment
