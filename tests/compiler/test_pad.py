"""Heads of zeros: the same logits, on ranks that the heads alone would not allow."""

from __future__ import annotations

import pytest
import torch
from einops import einsum

import funcmodels as fm
from compiler.partition import partition
from compiler.trace import trace
from funcmodels import ops
from funcmodels.errors import ShardingError
from tests.compiler.programs import allowed, check_on_ranks, inputs_of, weights_of
from tests.tiny_llama import tiny


def llama(heads: int, kv_heads: int, **changes) -> fm.Model:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8}
    return tiny(vocab_size=192, **sizes, **changes)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "want"),
    [
        (9, 3, 2, (12, 4)),
        (9, 3, 4, (12, 4)),
        (9, 3, 3, (9, 3)),
        (6, 3, 4, (8, 4)),
        (5, 1, 2, (10, 2)),
        (7, 7, 2, (8, 8)),
        (8, 2, 4, (8, 2)),
        (9, 3, 8, (24, 8)),
    ],
)
def test_sizes(heads, kv_heads, tp, want):
    padded = fm.pad_heads(llama(heads, kv_heads), tp)
    config = padded.model.hf_config
    assert config is not None
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == want
    assert tp in fm.check(padded.model, tp=tp)


@pytest.mark.parametrize("bias", [False, True])
def test_logits_stay_the_same(bias):
    model = llama(9, 3, attention_bias=bias)
    padded = fm.pad_heads(model, 4)
    weights = weights_of(model)
    more = padded.pad(weights)
    tokens, positions = inputs_of(7)
    want = model.forward(weights, tokens, positions)
    got = padded.model.forward(more, tokens, positions)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    back = padded.unpad(more)
    assert all(map(torch.equal, fm.tree.leaves(back), fm.tree.leaves(weights)))


@pytest.mark.parametrize("tp", [2, 4])
def test_on_ranks(tp):
    model = llama(9, 3)
    padded = fm.pad_heads(model, tp)
    program = trace(padded.model)
    local = partition(program)
    assert allowed(local, tp)
    check_on_ranks(program, local, tp, padded.pad(weights_of(model)), *inputs_of(5))


def test_a_folder(tmp_path):
    """What is saved is a checkpoint like any other."""
    model = llama(6, 3)
    padded = fm.pad_heads(model, 2)
    weights = weights_of(model, dtype=torch.float32)
    fm.save(padded.model, padded.pad(weights), tmp_path)
    loaded = fm.load_model(tmp_path)
    tokens, positions = inputs_of(5)
    got = loaded.forward(fm.load(loaded, tmp_path), tokens, positions)
    torch.testing.assert_close(got, model.forward(weights, tokens, positions))


P = fm.axes(vocab=24, hidden=16, heads=3, head_dim=8)


def over_heads(kind: str) -> fm.Model:
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        q = einsum(x, params["q"], "... e, h d e -> ... h d")
        o = ops.attention(q, q, q)
        if kind == "mean":
            o = o - o.mean(-2, keepdim=True)
        elif kind == "softmax":
            o = o * o.softmax(-2)
        elif kind == "number":
            o = o.reshape(*o.shape[:-2], 3 * 8).reshape(*o.shape[:-2], 3, 8)
        return ops.unembed(x + einsum(o, params["o"], "... h d, e h d -> ... e"), params["embed"])

    params = {
        "embed": P("vocab hidden"),
        "q": P("heads head_dim hidden"),
        "o": P("hidden heads head_dim"),
    }
    config = {"max_position_embeddings": 32, "num_hidden_layers": 1}
    return fm.Model("Mixes", config, params, forward, sharding={"heads": "tp"})


def test_heads_alone():
    assert fm.pad_heads(over_heads("none"), 2).sizes == {"heads": (3, 4)}


@pytest.mark.parametrize("kind", ["mean", "softmax"])
def test_what_zeros_would_change(kind):
    with pytest.raises(ShardingError, match="heads of zeros would change") as error:
        fm.pad_heads(over_heads(kind), 2)
    assert "test_pad.py" in str(error.value.lines["from"])


def test_a_number_of_heads_from_elsewhere():
    with pytest.raises(Exception, match="shape"):
        fm.pad_heads(over_heads("number"), 2)


def test_no_such_axis():
    with pytest.raises(ShardingError, match='no parameter of Mixes has an axis "q_heads"'):
        fm.pad_heads(over_heads("none"), 2, heads="q_heads")
