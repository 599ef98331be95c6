"""Every tensor is a parameter, an input or made of them, and a block is given all it uses."""

from __future__ import annotations

import torch

import funcmodels as fm
from tests.compiler.refusals import refused

A_TENSOR = torch.ones(16)


def reads_global(p, x, s):
    return x * A_TENSOR


def test_global_tensor():
    refused(reads_global, "a tensor from outside the function is read", r"P\(\.\.\.\)", "A_TENSOR")


def test_global_tensor_in_a_block():
    @fm.block
    def block(p, x):
        return x * p["w"] * A_TENSOR

    refused(lambda p, x, s: block(p, x), "a tensor from outside", r"P\(\.\.\.\)")


def test_block_closes_over_a_value():
    def body(p, x, s):
        y = x * 2

        @fm.block
        def block(q, x):
            return x * q["w"] * y

        return block(p["layers"][0], x)

    refused(body, "a block uses a value of the calling function", "as an argument", "* y")


def test_block_closes_over_a_parameter():
    def body(p, x, s):
        @fm.block
        def block(q, x):
            return x * q["w"] * p["w"]

        return block(p["layers"][0], x)

    refused(body, "a block uses the parameter w without being given it", "argument", '* p["w"]')


def test_block_calls_a_block_with_a_parameter_it_was_not_given():
    @fm.block
    def inner(q, x):
        return x * q["w"]

    def body(p, x, s):
        @fm.block
        def block(q, x):
            return inner(p["layers"][1], x)

        return block(p["layers"][0], x)

    refused(body, r"a block uses the parameter layers\.1\.w", "argument", "inner(p[")


@fm.block
def scaled(p, x, scale):
    return x * p["w"] * sum(scale)


def test_unhashable_static_argument():
    refused(
        lambda p, x, s: scaled(p["layers"][0], x, {1, 2}),
        "an argument of the block scaled cannot be compared",
        "frozen dataclass",
    )
