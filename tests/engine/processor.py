"""What vLLM's kernels for quantised layers need of a processor, and this one may lack."""

import pytest
import torch

HAS_AVX512 = torch.cpu._is_avx512_supported()
HAS_VNNI = torch.cpu._is_vnni_supported() or torch.cpu.get_capabilities().get("avx_vnni", False)
HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
OF_AVX512 = ("w4a16", "gptq", "awq", "float8 cache")


def need_kernel(scheme: str) -> None:
    """Skip where vLLM has no kernel for a scheme: it fails in the first step, or in the start."""
    if scheme in OF_AVX512 and not HAS_AVX512:
        pytest.skip(f"vLLM has kernels for {scheme} with AVX-512 alone")


def bfloat16_tolerance(rounding: float) -> float:
    """Of results whose error is of rounding: without AVX512-BF16, vLLM's kernels cut digits off.

    That is off by twice as much on the mean; of logits, half again as much was seen.
    """
    return rounding if HAS_BFLOAT16 else 1.5 * rounding


def is_near(scheme: str) -> bool:
    """Whether vLLM's kernel for a scheme computes what the scheme says.

    Without VNNI, pairs of products in int8 are added in 16 bits, and cut off at their ends: a
    product of matrices that use the whole range is off by an eighth.
    """
    return scheme != "int8" or HAS_VNNI
