"""Heads that 2 and 4 ranks do not divide: with heads of zeros, the same tokens on both."""

import pytest

import funcmodels as fm
from tests.engine.harness import generate, make_llm, run_in_engine
from tests.engine.test_lora import serve_adapters, write_adapter
from tests.engine.tiny import (
    PROMPTS,
    check,
    expected,
    register,
    serve_model,
    tiny_llama,
    weights_of,
)

MODEL = tiny_llama(hidden_size=192, num_attention_heads=6, num_key_value_heads=3)
# 15 heads on 3 ranks, of which its hidden size is no multiple; and a vocabulary for 3 ranks.
CHANGES = {"hidden_size": 160, "vocab_size": 384, "intermediate_size": 192}
ODD = tiny_llama(num_attention_heads=5, num_key_value_heads=1, **CHANGES)


@pytest.mark.parametrize(("model", "tp"), [(MODEL, 2), (MODEL, 4), (ODD, 3)])
def test_padded_heads(model, tp, tmp_path):
    """Of the folder's weights, and of others that are padded and pushed."""
    padded = fm.pad_heads(model, tp)
    weights, new = weights_of(model), weights_of(model, scale=1.1)
    fm.save(padded.model, padded.pad(weights), tmp_path)

    def run():
        register(padded.model)
        llm = make_llm(tmp_path, tp=tp)
        before = generate(llm, PROMPTS, prompt_logprobs=True)
        fm.push_weights(llm, padded.pad(new))
        return before, generate(llm, PROMPTS)

    before, after = run_in_engine(run)
    check(before, expected(model, weights))
    check(after, expected(model, new))


def test_an_adapter_of_the_model_without_zeros(tmp_path):
    """It has no rows for the heads of zeros, and changes the others as it is."""
    padded = fm.pad_heads(MODEL, 2)
    weights = weights_of(MODEL)
    fm.save(padded.model, padded.pad(weights), tmp_path)
    merged = write_adapter(tmp_path / "adapter", MODEL, weights, "proj")
    adapters = [None, tmp_path / "adapter", tmp_path / "adapter"]
    served = serve_adapters(padded.model, tmp_path, PROMPTS, adapters, tp=2)
    wanted = zip(expected(MODEL, weights), expected(MODEL, merged), adapters, strict=True)
    check(served, [with_it if adapter else plain for plain, with_it, adapter in wanted])


def test_without(tmp_path):
    weights = weights_of(MODEL)
    fm.save(MODEL, weights, tmp_path)
    with pytest.raises(Exception, match=r"heads .* must be divisible by tensor parallel size"):
        serve_model(MODEL, tmp_path, tp=4)
