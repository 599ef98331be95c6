"""The norms, against transformers' modules, torch's, and closed forms."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from funcmodels import ops
from funcmodels.errors import ShapeError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-3  # large enough that leaving it out shows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (LlamaRMSNorm, {}),
        (GemmaRMSNorm, {"offset": 1.0}),
        (GptOssRMSNorm, {"rounds_once": True}),
    ],
    ids=["llama", "gemma", "gpt-oss"],
)
def test_rms_norm_is_bitwise_that_of_transformers(module, settings, dtype):
    theirs = module(32, eps=EPS).to(dtype)
    theirs.weight.data.normal_()
    x = (0.05 * torch.randn(3, 5, 32)).to(dtype)
    got = ops.rms_norm(x, theirs.weight, eps=EPS, **settings)
    assert got.dtype == dtype
    assert torch.equal(got, theirs(x))


def test_rms_norm_of_constants():
    x = torch.full((4,), -3.0)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(ops.rms_norm(x, weight, eps=7.0), -0.75 * weight)
    torch.testing.assert_close(ops.rms_norm(x, weight, eps=7.0, offset=1.0), -0.75 * (1 + weight))


def test_rms_norm_keeps_the_dtype_of_x_and_normalises_in_float32():
    x = torch.full((64,), 300.0, dtype=torch.float16)  # its square overflows float16
    got = ops.rms_norm(x, torch.ones(64), eps=1e-6)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, torch.ones(64, dtype=torch.float16))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_is_that_of_torch(dtype, bias):
    theirs = torch.nn.LayerNorm(32, eps=EPS, bias=bias, dtype=dtype)
    for p in theirs.parameters():
        p.data.normal_()
    x = (0.05 * torch.randn(3, 5, 32)).to(dtype)
    assert torch.equal(ops.layer_norm(x, theirs.weight, theirs.bias, eps=EPS), theirs(x))


def test_layer_norm_of_two_values():
    x = torch.tensor([1.0, 3.0])
    got = ops.layer_norm(x, torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0]), eps=3.0)
    torch.testing.assert_close(got, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ops.layer_norm(x, None, eps=3.0), torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, w: ops.rms_norm(x, w, eps=EPS),
        lambda x, w: ops.rms_norm(x, w, eps=EPS, offset=1.0),
        lambda x, w: ops.layer_norm(x, w, w, eps=EPS),
    ],
)
def test_derivatives(norm):
    x, w = (torch.randn(*s, 6, dtype=torch.float64, requires_grad=True) for s in ((2,), ()))
    assert gradcheck(norm, (x, w), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(norm, (x, w), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("shape", [(3,), (2, 4), ()])
def test_weight_must_fit(shape):
    weight = torch.ones(shape)
    with pytest.raises(ShapeError, match=r"need: +weight \(4,\)[\s\S]*of size 4"):
        ops.rms_norm(torch.ones(2, 4), weight, eps=EPS)
    with pytest.raises(ShapeError, match=r"need: +bias \(4,\)"):
        ops.layer_norm(torch.ones(2, 4), torch.ones(4), weight, eps=EPS)
