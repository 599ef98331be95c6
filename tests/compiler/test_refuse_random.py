"""A model function must not draw random numbers, nor read memory as it happens to be."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import funcmodels as fm
from tests.compiler.refusals import refused


def draws(p, x, s):
    return x + torch.rand(16)


def draws_like(p, x, s):
    return x + torch.randn_like(x)


def draws_from_generator(p, x, s):
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def drops_out(p, x, s):
    return F.dropout(x, 0.1)


def drops_out_in_attention(p, x, s):
    return F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.1)[0]


def drops_out_in_attention_by_place(p, x, s):
    return F.scaled_dot_product_attention(x[None], x[None], x[None], None, 0.1)[0]


def drops_out_in_multi_head_attention(p, x, s):
    m, w, d = torch.zeros(48, 16), torch.zeros(16, 16), 0.1
    return F.multi_head_attention_forward(
        x, x, x, 16, 1, m, None, None, None, False, d, w, None, need_weights=False
    )[0]


def drops_channels(p, x, s):
    return F.dropout1d(x, 0.1)


def drops_channels_of_images(p, x, s):
    return F.dropout2d(x[None], 0.1)[0]


def drops_out_in_two(p, x, s):
    return torch.native_dropout(x, 0.1, True)[0]


def bernoulli(p, x, s):
    return x * torch.bernoulli(x.sigmoid())


def fills_randomly(p, x, s):
    return x + torch.zeros(16).uniform_()


def module_with_state(p, x, s):
    return torch.nn.Linear(16, 16)(x)


def uninitialised(p, x, s):
    return x * 0 + torch.empty(16)


def uninitialised_like(p, x, s):
    return x * 0 + torch.empty_like(x)


@pytest.mark.parametrize(
    ("body", "match", "fix"),
    [
        (draws, "torch.rand draws random numbers", "take the noise as an argument"),
        (draws_like, "torch.randn_like draws", "take the noise"),
        (draws_from_generator, "torch.randn draws", "take the noise"),
        (drops_out, "torch.dropout draws", "serving never drops out"),
        (drops_out_in_attention, "scaled_dot_product_attention draws", "never drops out"),
        (drops_out_in_attention_by_place, "scaled_dot_product_attention draws", "never drops"),
        (drops_out_in_multi_head_attention, "multi_head_attention_forward draws", "never drops"),
        (drops_channels, "torch.dropout1d draws", "never drops out"),
        (drops_channels_of_images, "torch.dropout2d draws", "never drops out"),
        (drops_out_in_two, "torch.native_dropout draws", "never drops out"),
        (bernoulli, "torch.bernoulli draws", "take the noise"),
        (fills_randomly, "uniform_ writes", "bind the result"),
        (module_with_state, "torch.empty gives whatever", "torch.zeros"),
        (uninitialised, "torch.empty gives whatever the memory held", "torch.zeros"),
        (uninitialised_like, "torch.empty_like gives", "torch.zeros_like"),
    ],
)
def test_not_a_function_of_the_arguments(body, match, fix):
    refused(body, match, fix, "return")


def draws_in_python(p, x, s):
    return x * random.random()


def draws_in_numpy(p, x, s):
    return x * float(np.random.rand())


@fm.block
def draws_in_a_block(p, x):
    return x * p["w"] * random.choice([1.0, 2.0])


def calls_what_draws(p, x, s):
    return draws_in_a_block(p["layers"][0], x)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (draws_in_python, "forward draws random numbers from random"),
        (draws_in_numpy, r"forward draws random numbers from numpy\.random"),
        (calls_what_draws, "draws_in_a_block draws random numbers from random"),
    ],
)
def test_numbers_drawn_in_python(body, match):
    refused(body, match, "config field")
