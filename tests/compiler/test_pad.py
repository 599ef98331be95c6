"""Heads of zeros: the same logits, on ranks that the heads alone would not allow."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from einops import einsum

import funcmodels as fm
from compiler.explain.padding import Cost
from compiler.explain.page import page
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


# What fm.explain says of it


def total(found: fm.Explanation) -> Cost:
    """Weights, cache and arithmetic, from the steps of an explanation for one rank."""
    works = [(step.work, block.count) for block in found.blocks for step in block.steps]
    return Cost(
        found.weights,
        found.kv_per_token,
        sum(w.flops * n for w, n in works if not w.is_per_sample),
        sum(w.attention_flops * n for w, n in works),
    )


def times(cost: Cost, n: int) -> list[int]:
    return [n * value for value in astuple(cost)]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_cost_is_the_difference_of_two_models(tp, pp, bias):
    model = llama(9, 3, attention_bias=bias)
    padded = fm.pad_heads(model, 4).model
    before, after = total(fm.explain(model)), total(fm.explain(padded))
    found = fm.explain(padded, tp=tp, pp=pp).head_padding
    assert found is not None
    assert found.sizes == {"heads": (9, 12), "kv_heads": (3, 4)}
    zeros = [times(alike.zeros, len(alike.ranks)) for alike in found.ranks]
    want = [b - a for a, b in zip(astuple(before), astuple(after), strict=True)]
    assert list(map(sum, zip(*zeros, strict=True))) == want
    for stage, unpadded in enumerate(found.unpadded):
        here = [alike for alike in found.ranks if alike.stage == stage]
        assert sum(len(alike.ranks) for alike in here) == tp
        lost = [times(alike.zeros, len(alike.ranks)) for alike in here]
        shares = [n / tp for n in map(sum, zip(*lost, strict=True))]
        whole = astuple(here[0].all)
        assert astuple(unpadded) == tuple(a - b for a, b in zip(whole, shares, strict=True))


def test_ranks_of_zeros_alone_are_told():
    padded = fm.pad_heads(llama(9, 3), 4).model
    found = fm.explain(padded, tp=4)
    assert found.head_padding is not None
    real, zeros = found.head_padding.ranks
    assert (real.ranks, real.zeros) == ((0, 1, 2), Cost())
    assert zeros.ranks == (3,)
    assert zeros.heads == {"heads": (3, 3), "kv_heads": (1, 1)}
    assert zeros.zeros.kv_per_token == found.kv_per_token
    text = " ".join(str(found).split())
    assert "Heads of zeros: heads 9-11 of 12, kv_heads 3 of 4" in text
    assert "3 of 3 heads, 1 of 1 kv_heads" in text
    html = page(found)
    assert "Heads of zeros: heads 9-11 of 12, kv_heads 3 of 4" in html
    assert "3 of 3 heads, 1 of 1 kv_heads" in html
    told = found.to_dict()["head_padding"]
    assert told["sizes"] == {"heads": (9, 12), "kv_heads": (3, 4)}
    assert told["ranks"][1]["zeros"]["kv_per_token"] == found.kv_per_token


def test_a_cache_that_several_ranks_share():
    """Four KV heads on eight ranks: the two ranks of the last one hold the same zeros."""
    padded = fm.pad_heads(llama(6, 3, num_hidden_layers=1), 4).model
    found = fm.explain(padded, tp=8)
    assert found.head_padding is not None
    assert [a.ranks for a in found.head_padding.ranks] == [(0, 1, 2, 3, 4, 5), (6, 7)]
    assert found.head_padding.ranks[1].zeros.kv_per_token == found.kv_per_token


def test_heads_that_were_padded_before():
    again = fm.pad_heads(fm.pad_heads(llama(9, 3), 4).model, 8).model
    found = fm.explain(again).head_padding
    assert found is not None
    assert found.sizes == {"heads": (9, 24), "kv_heads": (3, 8)}


@pytest.mark.parametrize("model", [llama(9, 3), fm.pad_heads(llama(9, 3), 3).model])
def test_no_zeros_no_cost(model):
    found = fm.explain(model)
    assert found.head_padding is None
    assert "Heads of zeros" not in str(found) + page(found)
