"""What only serving refuses: tokens of many requests lie in one batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import funcmodels as fm
from compiler.partition import partition
from compiler.tokens_apart import check_tokens_apart
from compiler.trace import trace
from compiler.vllm_target import source_for_vllm
from funcmodels.errors import LoweringError
from tests.compiler.programs import check_on_ranks, inputs_of, weights_of
from tests.compiler.refusals import model_of


def attends(p, x, s):
    h = x.reshape(-1, 4, 4).transpose(0, 1)
    return F.scaled_dot_product_attention(h, h, h, is_causal=True).transpose(0, 1).reshape(-1, 16)


def conv_over_time(p, x, s):
    return F.conv1d(x.T[None], p["w"][:, None, None].expand(16, 1, 3), padding=1, groups=16)[0].T


def attends_by_hand(p, x, s):
    return (x @ x.T).softmax(-1) @ x


def index_of_tokens(p, x, s):
    return x + torch.arange(x.shape[0])[:, None]


MIXES = {
    "cumsum": (lambda p, x, s: x.cumsum(0), "torch.cumsum makes tokens"),
    "mean": (lambda p, x, s: x - x.mean(0), "torch.mean makes tokens"),
    "mean of all": (lambda p, x, s: x - x.mean(), "torch.mean makes tokens"),
    "sum": (lambda p, x, s: x - x.sum(dim=0), "torch.sum makes tokens"),
    "max": (lambda p, x, s: x / x.abs().max(), "torch.max makes tokens"),
    "softmax": (lambda p, x, s: x.softmax(0), "torch.softmax makes tokens"),
    "last": (lambda p, x, s: x * x[-1], "getitem makes tokens"),
    "last as a slice": (lambda p, x, s: x * x[-1:], "getitem makes tokens"),
    "all but one": (lambda p, x, s: torch.cat((x[1:], x[:1])), "getitem makes tokens"),
    "flip": (lambda p, x, s: x.flip(0), "torch.flip makes tokens"),
    "roll": (lambda p, x, s: x.roll(1, 0), "torch.roll makes tokens"),
    "sort by NumPy's name": (lambda p, x, s: x.sort(axis=0).values, "torch.sort makes tokens"),
    "sort": (lambda p, x, s: x.sort(0).values, "torch.sort makes tokens"),
    "chunk": (lambda p, x, s: torch.cat(x.chunk(2, 0)[::-1]), "torch.chunk makes tokens"),
    "longest position": (lambda p, x, s: x * s.max(), "torch.max makes tokens"),
    "rows": (lambda p, x, s: x[s], "ops.embed makes tokens"),
    "matmul": (attends_by_hand, "torch.matmul makes tokens"),
    "conv": (conv_over_time, "torch.conv1d makes tokens depend on each other"),
    "sdpa": (attends, "scaled_dot_product_attention makes tokens depend"),
    "number of tokens": (lambda p, x, s: x * x.shape[0], "computes with the number of tokens"),
    "index in the batch": (index_of_tokens, "torch.arange computes with the number of tokens"),
    "groups": (lambda p, x, s: F.group_norm(x[None], 1)[0], "F.group_norm makes tokens"),
    "pool": (lambda p, x, s: F.avg_pool1d(x.T, 3, 1, 1).T, "torch.avg_pool1d makes tokens"),
    "distances": (lambda p, x, s: x * torch.cdist(x, x).sum(-1, True), "torch.cdist makes tokens"),
    "place": (lambda p, x, s: x * torch.searchsorted(s, s)[:, None], "torch.searchsorted makes"),
    "set": (lambda p, x, s: x * torch.isin(s, s + 1)[:, None], "torch.isin makes tokens"),
    "first": (lambda p, x, s: x.select_scatter(p["w"], 0, 0), "torch.select_scatter makes"),
    "added": (lambda p, x, s: x.index_add(0, s, x), "torch.index_add makes tokens"),
    "halves": (lambda p, x, s: torch.cat(x.vsplit([2])[::-1]), "torch.tensor_split makes tokens"),
    "scrambled": (lambda p, x, s: x.T.reshape(-1, 16), "torch.reshape makes tokens"),
}


@pytest.mark.parametrize("name", MIXES)
def test_tokens_are_kept_apart(name):
    body, match = MIXES[name]
    program = trace(model_of(body))
    with pytest.raises(LoweringError, match=match) as error:
        check_tokens_apart(program)
    assert "ops.attention" in error.value.lines["fix"] or "positions" in error.value.lines["fix"]
    assert "test_refuse_mixing.py" in str(error.value.lines["from"])


def test_what_has_no_rule_gathers_in_training_and_is_refused_served():
    """Over a cut dim with a rule that cannot keep it cut, a model is gathered and served."""

    def with_rule(p, x, s):
        return torch.flip(x @ p["m"].T, (-1,)) @ p["m"]

    def without_rule(p, x, s):
        h = x @ p["m"].T
        return h.masked_scatter(h > 0, 2 * h) @ p["m"]

    for body, name in ((with_rule, "torch.flip"), (without_rule, "torch.masked_scatter")):
        model = model_of(body)
        model = fm.Model(model.name, None, model.params, model.forward, sharding={"mlp": "tp"})
        program = trace(model)
        assert [g.operation for g in partition(program).gathered] == [name]
        check_on_ranks(program, partition(program), 2, weights_of(model), *inputs_of(5))
        if body is with_rule:
            assert "torch.flip(all_gather" in source_for_vllm(model)
        else:
            with pytest.raises(LoweringError, match="masked_scatter is not known to leave tokens"):
                source_for_vllm(model)
