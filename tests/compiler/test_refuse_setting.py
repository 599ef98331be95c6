"""A model function must not depend on the dtype, the device or the contexts it runs in."""

from __future__ import annotations

import pytest
import torch

from compiler.trace import trace
from tests.compiler.refusals import model_of, refused


def branches_on_dtype(p, x, s):
    return x.float().to(x.dtype) if x.dtype == torch.float16 else x * 2


def branches_on_another_dtype(p, x, s):
    return x if x.dtype != torch.bfloat16 else x * 2


def branches_on_half_dtypes(p, x, s):
    return x if x.dtype in (torch.float16, torch.bfloat16) else x * 2


def smallest_of_dtype(p, x, s):
    return x.clamp(min=torch.finfo(x.dtype).min / 2)


@pytest.mark.parametrize(
    "body",
    [branches_on_dtype, branches_on_another_dtype, branches_on_half_dtypes, smallest_of_dtype],
)
def test_branches_on_dtype(body):
    refused(body, "depends on the model's dtype", r"x\.float\(\)", "x.dtype")


def transformed(p, x, s):
    return x + torch.fft.rfft(x, dim=-1).real[..., :1]


def middle(p, x, s):
    return x - torch.quantile(x, 0.5, dim=-1, keepdim=True)


@pytest.mark.parametrize("body", [transformed, middle])
def test_operations_that_are_not_for_halves(body):
    refused(body, "is not for half precision", r"x\.float\(\) before it", "return")


def half_pairs(p, x, s):
    return torch.view_as_complex(x.unflatten(-1, (8, 2))).abs().sum(-1, True) * x


def half_polar(p, x, s):
    return x * torch.polar(x, x).real


@pytest.mark.parametrize("body", [half_pairs, half_polar])
def test_complex_numbers_of_the_models_dtype(body):
    refused(body, "bfloat16 has none", r"x\.float\(\) before it", "return")


def bits(p, x, s):
    return x * (x.view(torch.int16) > 3)


def from_bits(p, x, s):
    return x + (s[:, None].expand(x.shape) * 2).to(torch.int16).view(x.dtype)


@pytest.mark.parametrize("body", [bits, from_bits])
def test_bits_of_the_models_dtype(body):
    refused(body, "there may be 16 or 32", r"x\.float\(\)\.view", "return")


def test_an_operation_without_shapes():
    def quantised(p, x, s):
        return torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).to(x.dtype)

    refused(quantised, "torch does not say what shape it gives", "other operations", "return")


def test_an_operation_that_looks_at_values():
    def related(p, x, s):
        return x + torch.cov(x.T.float()).to(x.dtype)[0]

    refused(related, r"torch\.cov needs the value of a tensor", r"torch\.where", "return")


def test_an_operation_that_torch_cannot_map():
    def mapped(p, x, s):
        pairs = x.float().reshape(-1, 4, 4)
        return x + torch.func.vmap(lambda row: torch.fft.rfft(row).abs())(pairs).sum() + 1

    refused(mapped, r"torch\.fft\.rfft cannot be recorded inside a", "outside the vmap", "return")


def branches_on_cuda(p, x, s):
    return x * 2 if x.is_cuda else x


def branches_on_device(p, x, s):
    where = x.device
    return x * 2 if where.type == "cuda" else x


def branches_on_parameters_device(p, x, s):
    return x * 2 if p["w"].get_device() >= 0 else x


@pytest.mark.parametrize(
    "body", [branches_on_cuda, branches_on_device, branches_on_parameters_device]
)
def test_branches_on_the_device(body):
    words = {"branches_on_cuda": "is_cuda", "branches_on_device": "x.device"}
    line = words.get(body.__name__, "get_device")
    refused(body, "depends on the device", "the same operations everywhere", line)


def without_gradients(p, x, s):
    with torch.no_grad():
        y = x * p["w"]
    return y


def with_autocast(p, x, s):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x * p["w"]
    return y


@pytest.mark.parametrize(
    ("body", "match", "fix"),
    [
        (without_gradients, "torch.no_grad or torch.inference_mode is active", r"x\.detach\(\)"),
        (with_autocast, "torch.autocast is active", "cast"),
    ],
)
def test_contexts_are_not_recorded(body, match, fix):
    refused(body, match, fix)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_tracing_without_gradients_is_fine():
    with torch.no_grad():
        trace(model_of(lambda p, x, s: x * p["w"]))
