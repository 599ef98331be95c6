"""Write a model once, as a pure function; train it with torch.func, serve it with vLLM."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from funcmodels import errors, ops, optim, tree
from funcmodels.block import block
from funcmodels.check_recurrence import check_recurrence
from funcmodels.checkpoint import load, save
from funcmodels.generate import generate, logprobs
from funcmodels.gradients import accumulate, grad_and_value
from funcmodels.init import init, normal
from funcmodels.loss import loss
from funcmodels.models.registry import load_model
from funcmodels.ops.attention_kernels import attention_kernel
from funcmodels.packing import pack
from funcmodels.pooling import classify, embed
from funcmodels.precision import cast
from funcmodels.sharding import PartitionSpec
from funcmodels.spec import Axes, Model, Param, axes
from funcmodels.state import State, state

if TYPE_CHECKING:
    from compiler.check import Grid, check, check_grid
    from compiler.compare import Verified, verify
    from compiler.explain import DEVICES, Device, Explanation, explain
    from compiler.mesh import Place
    from compiler.pad import pad_heads
    from compiler.parallel import ParallelContext
    from compiler.pipeline import ModelStage, pipeline_stage
    from compiler.register import register
    from compiler.strict import allow
    from compiler.torch_target import CompiledModel, compile_to_torch
    from compiler.trace import trace
    from compiler.vllm_push import push_weights
    from compiler.vllm_target import compile_to_vllm, emit
    from funcmodels import nn
    from funcmodels.train import Fitted, fit
    from funcmodels.training_checkpoint import Checkpoints

# The compiler is imported on first use, and of it what that needs: training never pays for it, and
# never needs vLLM; serving does not pay for what explains and checks.
_COMPILER = {
    "CompiledModel": "compiler.torch_target",
    "DEVICES": "compiler.explain",
    "Device": "compiler.explain",
    "Explanation": "compiler.explain",
    "Grid": "compiler.check",
    "ModelStage": "compiler.pipeline",
    "ParallelContext": "compiler.parallel",
    "Place": "compiler.mesh",
    "allow": "compiler.strict",
    "check": "compiler.check",
    "check_grid": "compiler.check",
    "explain": "compiler.explain",
    "emit": "compiler.vllm_target",
    "compile_to_torch": "compiler.torch_target",
    "compile_to_vllm": "compiler.vllm_target",
    "push_weights": "compiler.vllm_push",
    "pad_heads": "compiler.pad",
    "pipeline_stage": "compiler.pipeline",
    "register": "compiler.register",
    "trace": "compiler.trace",
    "Verified": "compiler.compare",
    "verify": "compiler.compare",
    # The loop brings torch.distributed.checkpoint and rich with it.
    "Checkpoints": "funcmodels.training_checkpoint",
    "Fitted": "funcmodels.train",
    "fit": "funcmodels.train",
}

__version__ = "0.1.0"

__all__ = [
    "DEVICES",
    "Axes",
    "Checkpoints",
    "CompiledModel",
    "Device",
    "Explanation",
    "Fitted",
    "Grid",
    "Model",
    "ModelStage",
    "ParallelContext",
    "Param",
    "PartitionSpec",
    "Place",
    "State",
    "Verified",
    "accumulate",
    "allow",
    "attention_kernel",
    "axes",
    "block",
    "cast",
    "check",
    "check_grid",
    "check_recurrence",
    "classify",
    "compile_to_torch",
    "compile_to_vllm",
    "embed",
    "emit",
    "errors",
    "explain",
    "fit",
    "generate",
    "grad_and_value",
    "init",
    "load",
    "load_model",
    "logprobs",
    "loss",
    "nn",
    "normal",
    "ops",
    "optim",
    "pack",
    "pad_heads",
    "pipeline_stage",
    "push_weights",
    "register",
    "save",
    "state",
    "trace",
    "tree",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "nn":  # whose layers communicate as the compiler's graphs do
        return importlib.import_module("funcmodels.nn")
    if name in _COMPILER:
        return getattr(importlib.import_module(_COMPILER[name]), name)
    raise AttributeError(f"module 'funcmodels' has no attribute {name!r}")
