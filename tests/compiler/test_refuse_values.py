"""Python must not decide by a tensor's value, nor give torch a function that does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._higher_order_ops.scan import scan

from tests.compiler.refusals import refused


def reads_numpy(p, x, s):
    return x * p["w"].detach().numpy()


def reads_by_array(p, x, s):
    return x * np.asarray(p["w"])


def masked_select(p, x, s):
    return x + torch.masked_select(x, x > 0).sum()


def reads_shape_of_values(p, x, s):
    return x + torch.nonzero(x).shape[0]


def asserts_on_value(p, x, s):
    assert (x > 0).all()
    return x


def loops_on_value(p, x, s):
    while x.norm() > 1:
        x = x / 2
    return x


@pytest.mark.parametrize(
    "body",
    [reads_numpy, reads_by_array, masked_select, reads_shape_of_values, asserts_on_value,
     loops_on_value],
)  # fmt: skip
def test_reads_values_in_other_ways(body):
    refused(body, "needs the value of a tensor|from outside the function", "torch.where|P")


def branches_on_value(p, x, s):
    if x.sum() > 0:
        return x
    return -x


def reads_item(p, x, s):
    return x * s.max().item()


def reads_int(p, x, s):
    return x * int(s.max())


def reads_float(p, x, s):
    return x * float(p["w"].sum())


def reads_list(p, x, s):
    return x * p["w"].tolist()[0]


def masks(p, x, s):
    return x * x[s > 3].sum(0)


def hides_refusal(p, x, s):
    try:
        return x if x.sum() > 0 else -x
    except Exception:
        return x * 2


@pytest.mark.parametrize(
    "body",
    [branches_on_value, reads_item, reads_int, reads_float, reads_list, masks, hides_refusal],
)
def test_needs_a_value(body):
    refused(body, "needs the value of a tensor", r"torch.where\(condition, a, b\)")


def scans_layers(p, x, s):
    stacked = torch.stack([layer["w"] for layer in p["layers"]])
    return scan(lambda c, w: (c * w, c.sum()), x, stacked)[0]


def chooses(p, x, s):
    return torch.cond(p["w"].sum() > 0, lambda y: y * 2, lambda y: -y, (x,))


@pytest.mark.parametrize(("body", "line"), [(scans_layers, "return scan"), (chooses, "torch.cond")])
def test_functions_given_to_torch(body, line):
    refused(body, "is given a function", "a Python loop", line)
