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
    from compiler.api import (
        DEVICES,
        CompiledModel,
        Device,
        Explanation,
        Grid,
        ModelStage,
        ParallelContext,
        Place,
        Verified,
        allow,
        check,
        check_grid,
        compile_to_torch,
        compile_to_vllm,
        emit,
        explain,
        pad_heads,
        pipeline_stage,
        register,
        trace,
        verify,
    )
    from compiler.vllm_push import push_weights
    from funcmodels import nn
    from funcmodels.train import Fitted, fit
    from funcmodels.training_checkpoint import Checkpoints

# The compiler is imported on first use, so that training never pays for it, and never needs vLLM.
_COMPILER = {
    "CompiledModel": "compiler.api",
    "DEVICES": "compiler.api",
    "Device": "compiler.api",
    "Explanation": "compiler.api",
    "Grid": "compiler.api",
    "ModelStage": "compiler.api",
    "ParallelContext": "compiler.api",
    "Place": "compiler.api",
    "allow": "compiler.api",
    "check": "compiler.api",
    "check_grid": "compiler.api",
    "explain": "compiler.api",
    "emit": "compiler.api",
    "compile_to_torch": "compiler.api",
    "compile_to_vllm": "compiler.api",
    "push_weights": "compiler.vllm_push",
    "pad_heads": "compiler.api",
    "pipeline_stage": "compiler.api",
    "register": "compiler.api",
    "trace": "compiler.api",
    "Verified": "compiler.api",
    "verify": "compiler.api",
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
