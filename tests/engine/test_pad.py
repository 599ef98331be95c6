"""Heads that 2 and 4 ranks do not divide: with heads of zeros, the same tokens on both."""

import pytest

import funcmodels as fm
from tests.engine.tiny import check, expected, serve_model, tiny_llama, weights_of

MODEL = tiny_llama(hidden_size=192, num_attention_heads=6, num_key_value_heads=3)
# 15 heads on 3 ranks, of which its hidden size is no multiple; and a vocabulary for 3 ranks.
CHANGES = {"hidden_size": 160, "vocab_size": 384, "intermediate_size": 192}
ODD = tiny_llama(num_attention_heads=5, num_key_value_heads=1, **CHANGES)


@pytest.mark.parametrize(("model", "tp"), [(MODEL, 2), (MODEL, 4), (ODD, 3)])
def test_padded_heads(model, tp, tmp_path):
    padded = fm.pad_heads(model, tp)
    weights = weights_of(model)
    fm.save(padded.model, padded.pad(weights), tmp_path)
    check(serve_model(padded.model, tmp_path, tp=tp), expected(model, weights))


def test_without(tmp_path):
    weights = weights_of(MODEL)
    fm.save(MODEL, weights, tmp_path)
    with pytest.raises(Exception, match=r"heads .* must be divisible by tensor parallel size"):
        serve_model(MODEL, tmp_path, tp=4)
