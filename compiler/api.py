"""The compiler's entry points, as `funcmodels` re-exports them."""

from __future__ import annotations

from compiler.check import Grid, check, check_grid
from compiler.compare import Verified, verify
from compiler.explain import DEVICES, Device, Explanation, explain
from compiler.mesh import Place
from compiler.pad import Padded, pad_heads
from compiler.parallel import ParallelContext
from compiler.pipeline import ModelStage, pipeline_stage
from compiler.register import register
from compiler.strict import allow
from compiler.torch_target import CompiledModel, compile_to_torch
from compiler.trace import trace
from compiler.vllm_target import compile_to_vllm, emit

__all__ = [
    "DEVICES",
    "CompiledModel",
    "Device",
    "Explanation",
    "Grid",
    "ModelStage",
    "Padded",
    "ParallelContext",
    "Place",
    "Verified",
    "allow",
    "check",
    "check_grid",
    "compile_to_torch",
    "compile_to_vllm",
    "emit",
    "explain",
    "pad_heads",
    "pipeline_stage",
    "register",
    "trace",
    "verify",
]
