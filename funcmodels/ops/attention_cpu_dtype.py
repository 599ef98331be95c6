"""In which dtype ATen's flash kernel for CPUs computes gradients fastest."""

from __future__ import annotations

import torch

# The products of shorter sequences are small: in bfloat16, oneDNN takes longer to start one than
# float32's takes in all.
SHORT = 400


def gradient_dtype(dtype: torch.dtype, seq: int) -> torch.dtype:
    """float32 for bfloat16 where sequences are short, or the processor has no bfloat16.

    Without it, the kernel takes 4 times as long for 200 tokens and 6 times for 512 as in float32.
    """
    if dtype is torch.bfloat16 and (seq < SHORT or not has_bfloat16()):
        return torch.float32
    return dtype


def has_bfloat16() -> bool:
    """Whether oneDNN multiplies in bfloat16 here."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
