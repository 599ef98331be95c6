"""Layers as vLLM's."""

from __future__ import annotations

from typing import Any

from torch import nn


def to_vllm(module: nn.Module, *, prefix: str = "", quant_config: Any = None) -> nn.Module:
    """A module with vLLM's layers where it has these, for use in a class written for vLLM.

    Called where vLLM makes its models, in the `__init__` of such a class:

        self.mlp = fm.nn.to_vllm(MLP(hidden, inner), prefix=f"{prefix}.mlp")

    The result has the module's own `forward`. Weights go into vLLM's layers, each rank's part of
    them; a module made under `torch.device("meta")` has none, and the class's `load_weights` fills
    the layers, which have vLLM's weight loaders. Their dtype is the engine's.

        ColumnParallelLinear, RowParallelLinear   vLLM's, with return_bias=False
        VocabParallelEmbedding                    vLLM's
        ParallelLMHead                            vLLM's: give it to a LogitsProcessor, not an input
        RMSNorm, with offset 1.0                  RMSNorm, GemmaRMSNorm
        LayerNorm                                 LayerNorm
        RotaryEmbedding                           get_rope, with the arguments of the layer here

    Args:
        module: a layer, or a module that has layers somewhere in it. It is not changed. Parameters
            of its own are shared with the result, or, on the meta device, made anew for vLLM to
            load.
        prefix: the module's name in the served model, which quantisation and adapters go by.
        quant_config: vLLM's, for a module without weights.
    Raises:
        LoweringError: vLLM has no layer for one of the module's; or values that are needed are on
            the meta device, or with quant_config are not.
    """
    from compiler.vllm_layers import converted

    return converted(module, prefix, quant_config)
