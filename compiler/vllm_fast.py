"""Norms and activations of vLLM's that run eagerly on a CPU as its kernels do.

Copied into emitted files as it stands here; it may use the names that the file imports, and what
else is copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from vllm import _custom_ops
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm


def kernels_round(dtype: torch.dtype) -> bool:
    """Whether vLLM's CPU kernels round to a dtype; without AVX512-BF16 they cut bfloat16 off."""
    return dtype != torch.bfloat16 or torch.cpu._is_avx512_bf16_supported()


def normed_wide(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float):
    """Root-mean-square normalisation by vLLM's kernel in float32, rounded once by torch."""
    wide = x.float() if residual is None else x.float() + residual
    # The kernel reads a tensor's rows one after another, and writes no strides.
    wide = wide.contiguous()
    out = torch.empty_like(wide)
    _custom_ops.rms_norm(out, wide, weight, eps)
    y = out.to(x.dtype)
    return y if residual is None else (y, wide.to(x.dtype))


class FastRMSNorm(RMSNorm):
    """vLLM's RMSNorm; run eagerly on a CPU, by vLLM's kernel and not by ten operations."""

    def forward_cpu(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        if not kernels_round(x.dtype):
            return normed_wide(x, residual, self.weight.float(), self.variance_epsilon)
        if residual is None:
            # The kernel reads a tensor's rows one after another, and writes no strides.
            x = x.contiguous()
            out = torch.empty_like(x)
            _custom_ops.rms_norm(out, x, self.weight, self.variance_epsilon)
            return out
        if not (x.is_contiguous() and residual.is_contiguous()):
            return self.forward_native(x, residual)
        _custom_ops.fused_add_rms_norm(x, residual, self.weight, self.variance_epsilon)
        return x, residual


class FastGemmaRMSNorm(GemmaRMSNorm):
    """vLLM's GemmaRMSNorm; run eagerly on a CPU, by vLLM's kernel, in float32 as it is there."""

    def forward_cpu(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        if x.dtype == torch.float32:  # vLLM's own bits: int8 after a norm shows the last of them
            return self.forward_native(x, residual)
        return normed_wide(x, residual, self.weight.float() + 1.0, self.variance_epsilon)


class FastSiluAndMul(SiluAndMul):
    """vLLM's SiluAndMul; run eagerly on a CPU, it makes one new tensor and not two."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class FastGeluAndMul(GeluAndMul):
    """vLLM's GeluAndMul; run eagerly on a CPU, it makes one new tensor and not two."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate=self.approximate).mul_(up)

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        if self.approximate == "tanh":
            return gelu_tanh(gate) * up
        return F.gelu(gate, approximate=self.approximate) * up


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """F.gelu(x, approximate="tanh"); compiled, with an exponential, in half the time on a CPU.

    0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)): the sum of tanh loses digits where x is negative.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    minus_2u = wide * (-1.5957691216057308 - 0.07135481627260025 * wide * wide)
    return (wide / (1.0 + torch.exp(minus_2u))).to(x.dtype)
