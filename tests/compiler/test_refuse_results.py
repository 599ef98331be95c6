"""What a model function must return, and that errors of others are given its line."""

from __future__ import annotations

import functools
import re

import pytest

from compiler.trace import trace
from funcmodels import ops
from funcmodels.errors import ShapeError, TraceError
from tests.compiler.programs import small
from tests.compiler.refusals import model_of


@pytest.mark.parametrize(
    ("body", "got"),
    [
        (lambda p, t, s: t, r"\(num_tokens\) of int64"),
        (lambda p, t, s: None, "NoneType"),
        (lambda p, t, s: (ops.embed(t, p["embed"]),), "tuple"),
        (lambda p, t, s: {"logits": ops.embed(t, p["embed"])}, "dict"),
        (lambda p, t, s: p["embed"], r"\(24, 16\) of float16"),
        (lambda p, t, s: ops.embed(t, p["embed"])[-1], r"\(16\) of float16"),
        (lambda p, t, s: ops.embed(t, p["embed"])[None], r"\(1, num_tokens, 16\)"),
        (lambda p, t, s: ops.embed(t, p["embed"]).T, r"\(16, num_tokens\)"),
        (lambda p, t, s: ops.embed(t, p["embed"]).argmax(-1), r"\(num_tokens\) of int64"),
        (lambda p, t, s: ops.embed(t, p["embed"]).long(), r"\(num_tokens, 16\) of int64"),
    ],
)
def test_wrong_result(body, got):
    with pytest.raises(TraceError, match="forward does not return logits") as error:
        trace(model_of(body, outer=True))
    assert re.search(got, error.value.lines["got"])
    assert "ops.unembed(x, params['head'])" in error.value.lines["fix"]
    assert "refusals.py" in str(error.value.lines["from"])


def test_wrong_result_of_a_partial():
    def forward(params, tokens, positions, segment_ids=None, *, scale):
        return tokens * scale

    with pytest.raises(TraceError, match="forward does not return logits") as error:
        trace(small(functools.partial(forward, scale=2)))
    assert str(error.value.lines["from"]).endswith("in forward")


def test_errors_without_a_line_are_given_one():
    """Those of our ops, and torch's own."""
    with pytest.raises(ShapeError, match="unembed") as error:
        trace(model_of(lambda p, x, s: x[..., :3]))
    assert "refusals.py" in str(error.value)
    with pytest.raises(RuntimeError) as other:
        trace(model_of(lambda p, x, s: x + x @ p["m"].T))
    assert "test_refuse_results.py" in other.value.__notes__[0]
