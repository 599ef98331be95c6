"""A model function must not write into what it was given, nor into what it has made."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import silu

import funcmodels as fm
from compiler.trace import trace
from funcmodels.errors import TraceError
from tests.compiler.refusals import model_of, refused


@fm.block
def writes_parameter(p, x):
    p["w"].mul_(2)
    return x * p["w"]


@fm.block
def assigns_parameter(p, x):
    p["w"] = p["w"] * 2
    return x * p["w"]


@fm.block
def multiplies_parameter_in_place(p, x):
    p["w"] *= 2
    return x * p["w"]


@fm.block
def appends(p, x, seen):
    seen.append(x)
    return x * p["w"]


def test_a_block_writes_into_a_parameter():
    refused(
        lambda p, x, s: writes_parameter(p["layers"][0], x), "mul_ writes into a tensor", "x.mul"
    )


def test_the_line_of_a_write_is_the_blocks():
    with pytest.raises(TraceError) as error:
        trace(model_of(lambda p, x, s: writes_parameter(p["layers"][0], x)))
    line = inspect.getsourcelines(writes_parameter.__wrapped__)[1] + 2
    assert str(error.value.lines["from"]) == f"test_refuse_writes.py:{line} in writes_parameter"


def test_a_block_assigns_to_its_parameters():
    refused(
        lambda p, x, s: assigns_parameter(p["layers"][0], x),
        "assigns_parameter changes the parameters it was given",
        "bind the new value to a local name",
    )


def test_a_block_multiplies_a_parameter_in_place():
    refused(
        lambda p, x, s: multiplies_parameter_in_place(p["layers"][0], x),
        "mul_ writes into",
        "x.mul",
    )


def test_a_block_appends_to_a_list_it_was_given():
    refused(lambda p, x, s: appends(p["layers"][0], x, []), "appends changes", "local name")


def set_item(p, x, s):
    y = x * 1
    y[0] = 1
    return y


def set_column(p, x, s):
    y = x * 1
    y[..., 0] = 1
    return y


def in_place_on_temporary(p, x, s):
    y = x * 1
    y.add_(1)
    return y


def augmented(p, x, s):
    x += p["w"]
    return x


def augmented_power(p, x, s):
    y = x * 1
    y **= 2
    return y


def augmented_and(p, x, s):
    mask = s > 1
    mask &= s > 2
    return x * mask[..., None]


def out_argument(p, x, s):
    y = x * 1
    torch.mul(x, 2, out=y)
    return y


def inplace_flag(p, x, s):
    y = x * 1
    F.relu(y, inplace=True)
    return y


def inplace_flag_by_position(p, x, s):
    y = x * 1
    silu(y, True)
    return y


def copies_into(p, x, s):
    y = torch.zeros_like(x)
    y.copy_(x)
    return y


def sets_data(p, x, s):
    y = x * 1
    y.data = x
    return y


@pytest.mark.parametrize(
    ("body", "match", "fix", "line"),
    [
        (set_item, "__setitem__ writes", "torch.where", "y[0] = 1"),
        (set_column, "__setitem__ writes", "torch.cat", "y[..., 0] = 1"),
        (in_place_on_temporary, "add_ writes", r"x = x\.add\(", "y.add_(1)"),
        (augmented, "add_ writes", r"x = x\.add\(", "x += "),
        (augmented_power, "pow_ writes", r"x = x\.pow\(", "y **= 2"),
        (augmented_and, "__iand__ writes", "bind the result", "mask &= "),
        (out_argument, "out= writes", "leave out= out", "out=y"),
        (inplace_flag, "inplace= writes", "leave inplace= out", "inplace=True"),
        (inplace_flag_by_position, "inplace= writes", "leave inplace= out", "silu(y, True)"),
        (copies_into, "copy_ writes", "bind the result", "y.copy_"),
        (sets_data, "__set__ writes", "make a new tensor", "y.data = x"),
    ],
)
def test_writes(body, match, fix, line):
    refused(body, match, fix, line)


def assigns(p, x, s):
    p["w"] = p["w"] * 2
    return x


def appends_to_layers(p, x, s):
    p["layers"].append(p["layers"][0])
    return x


def pops_layer(p, x, s):
    p["layers"].pop()
    return x


def adds_key(p, x, s):
    p["layers"][0]["z"] = x
    return x


@pytest.mark.parametrize("body", [assigns, appends_to_layers, pops_layer, adds_key])
def test_changed_tree(body):
    refused(body, "forward changes the parameters it was given", "local name")
