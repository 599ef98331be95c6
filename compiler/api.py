"""The compiler's entry points, as `funcmodels` re-exports them."""

from __future__ import annotations

from compiler.check import check
from compiler.parallel import ParallelContext
from compiler.register import register
from compiler.torch_target import CompiledModel, compile_to_torch
from compiler.trace import trace
from compiler.vllm_target import compile_to_vllm, emit

__all__ = [
    "CompiledModel",
    "ParallelContext",
    "check",
    "compile_to_torch",
    "compile_to_vllm",
    "emit",
    "register",
    "trace",
]
