"""strict= refuses gathers and plain products with the user's line, unless they are allowed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from einops import einsum

import funcmodels as fm
from compiler.vllm_target import source_for_vllm
from examples import hello
from funcmodels import ops
from funcmodels.errors import LoweringError
from tests.compiler.programs import TABLE, axes, small

P = axes()


def per_head(x: Any, w: Any) -> Any:
    return einsum(x, w, "t h d, h d e -> t h e")  # a matrix for each head


def ranked(x: Any) -> Any:
    return torch.sort(x, dim=-1)[0]  # no rule along a cut dim


def model_of(*, heads: bool = False, gathers: bool = False) -> fm.Model:
    params = {
        "q": P("heads head_dim hidden"),
        "o": P("hidden heads head_dim"),
        "up": P("mlp hidden"),
        "down": P("hidden mlp"),
    }
    if heads:
        params["w"] = fm.axes(heads=4, head_dim=4, out=4)("heads head_dim out")

    def forward(p: Any, tokens: Any, positions: Any, segment_ids: Any = None) -> Any:
        x = ops.embed(tokens, p["embed"])
        q = einsum(x, p["q"], "t e, h d e -> t h d")
        q = per_head(q, p["w"]) if heads else q
        x = x + einsum(q, p["o"], "t h d, e h d -> t e")
        h = torch.relu(x @ p["up"].T)
        h = ranked(h) if gathers else h
        return ops.unembed(x + h @ p["down"].T, p["head"])

    return small(forward, params, TABLE)


def test_layers_alone_are_accepted():
    for model in (hello.model, model_of()):
        assert source_for_vllm(model, strict=True) == source_for_vllm(model)


@pytest.mark.parametrize(
    ("kind", "what", "function"),
    [
        ({"heads": True}, "torch.einsum with a parameter is left to plain torch", "per_head"),
        ({"gathers": True}, "no sharding rule for torch.sort over a sharded dim", "ranked"),
    ],
)
def test_refused_and_allowed(kind, what, function):
    model = model_of(**kind)
    source_for_vllm(model)  # it is right without
    with pytest.raises(LoweringError, match=re.escape(what)) as error:
        source_for_vllm(model, strict=True)
    where = str(error.value.lines["from"])
    assert where.startswith("test_strict.py:")
    assert where.endswith(f" in {function}")
    assert f'strict=fm.allow("{function}")' in str(error.value.lines["fix"])
    allowed = source_for_vllm(model, strict=fm.allow(function))
    assert allowed == source_for_vllm(model)
    assert source_for_vllm(model, strict=fm.allow(where.partition(" ")[0])) == allowed
    with pytest.raises(LoweringError, match=re.escape(what)):
        source_for_vllm(model, strict=fm.allow("another", "test_strict.py:1"))


def test_one_allowed_place_does_not_allow_another():
    model = model_of(heads=True, gathers=True)
    source_for_vllm(model, strict=fm.allow("ranked", "per_head"))
    for one, other in (("ranked", "per_head"), ("per_head", "ranked")):
        with pytest.raises(LoweringError, match=f"in {other}"):
            source_for_vllm(model, strict=fm.allow(one))


def test_a_gather_that_a_rule_asks_for():
    """Logits made by another product than ops.unembed are gathered by themselves."""

    def forward(p: Any, tokens: Any, positions: Any, segment_ids: Any = None) -> Any:
        x = ops.embed(tokens, p["embed"])
        logits = ops.unembed(x, p["head"])
        return logits - logits.logsumexp(-1, keepdim=True)

    model = small(forward, {}, {"vocab": "tp"})
    with pytest.raises(LoweringError) as error:
        source_for_vllm(model, strict=True)
    assert "test_strict.py" in str(error.value.lines["from"])


def test_what_explain_marks_is_what_strict_refuses():
    model = model_of(heads=True)
    marked = [step for _, step in fm.explain(model, tp=2).plain if step.is_product]
    assert [step.where.function for step in marked] == ["per_head"]
    assert not any(step.is_product for _, step in fm.explain(model_of(), tp=2).plain)
