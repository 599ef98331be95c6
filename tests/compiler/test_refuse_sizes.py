"""Python must not decide by the number of tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import funcmodels as fm
from compiler.trace import trace
from funcmodels.errors import TraceError
from tests.compiler.refusals import model_of, refused


def branches_on_tokens(p, x, s):
    if x.shape[0] > 128:
        return x
    return -x


def branches_on_tokens_at_the_end(p, x, s):
    y = x * 2
    return y if y.size(0) > 128 else -y


def clips_tokens(p, x, s):
    return x * min(x.shape[0], 64)


def root_of_tokens(p, x, s):
    return x / math.sqrt(x.shape[0])


def counts_tokens(p, x, s):
    for _ in range(x.shape[0]):
        x = x + 1
    return x


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (branches_on_tokens, "if x.shape"),
        (branches_on_tokens_at_the_end, "return"),
        (clips_tokens, "return"),
        (root_of_tokens, "return"),
        (counts_tokens, "for _ in"),
    ],
)
def test_branches_on_the_number_of_tokens(body, line):
    refused(body, "Python branches on the number of tokens", "config field", line)


ONE_TOKEN = {
    "is one": lambda x: x.shape[0] == 1,
    "is not one": lambda x: x.shape[0] != 1,
    "more than one": lambda x: x.shape[0] > 1,
    "fewer than two": lambda x: x.size(0) < 2,
    "length": lambda x: len(x) == 1,
    "elements": lambda x: x.numel() == 16,
    "truth": lambda x: x.shape[0] - 1,
    "shape": lambda x: x.shape == (1, 16),
    "other shape": lambda x: x.shape != (1, 16),
    "among": lambda x: x.shape[0] in (1, 2),
    "at least two": lambda x: max(x.shape[0], 2) == 2,
}


@pytest.mark.parametrize("ask", ONE_TOKEN)
@pytest.mark.parametrize("batched", [False, True])
def test_branches_on_one_token(ask, batched):
    """Also after operations that have asked the same on their own."""

    def asks(p, x, s):
        x = torch.softmax(F.linear(x, p["m"]) @ p["m"], -1)
        return x * p["w"] if ONE_TOKEN[ask](x.flatten(0, -2)) else x

    with pytest.raises(TraceError, match="Python branches on the number of tokens") as error:
        trace(model_of(asks), batched=batched)
    assert "test_refuse_sizes.py" in str(error.value.lines["from"])


def test_an_operation_that_asks_first_hides_no_branch():
    """A view of tokens in any layout asks torch whether there is one."""

    def asks(p, x, s):
        x = x.T.reshape(16, -1).T.contiguous()
        return x * p["w"] if x.shape[0] == 1 else x

    refused(asks, "Python branches on the number of tokens", "config field", "if x.shape")


def test_what_holds_for_any_number_of_tokens_is_no_branch():
    def asks(p, x, s):
        assert x.shape[0] == s.shape[0]
        assert x.shape[0]
        assert x.shape[0] > 0
        return x * p["w"]

    trace(model_of(asks))


def test_iterating_over_tokens():
    refused(
        lambda p, x, s: torch.stack([row for row in x]),
        "unbind is only recorded for one number of tokens",
        "index with",
    )


def test_a_power_of_the_number_of_tokens():
    refused(lambda p, x, s: x * x.shape[0] ** -0.5, "computed from the number of tokens", "config")


@fm.block
def takes_count(p, x, n):
    return x.reshape(n, 16) * p["w"]


def test_the_number_of_tokens_as_an_argument():
    refused(
        lambda p, x, s: takes_count(p["layers"][0], x, x.shape[0]),
        "the block takes_count is given the number of tokens",
        r"x\.shape\[0\]",
    )
