"""Layers for your own `nn.Module`: alone, cut over ranks, or as vLLM's.

    class MLP(nn.Module):
        def __init__(self, hidden, inner, mesh=None):
            super().__init__()
            self.up = fm.nn.ColumnParallelLinear(hidden, inner, mesh=mesh)
            self.down = fm.nn.RowParallelLinear(inner, hidden, mesh=mesh)

        def forward(self, x):
            return self.down(F.silu(self.up(x)))

Each holds a rank's part of its parameters as plain tensors, and communicates in its forward.
"""

from funcmodels.nn.layer import ParallelLayer
from funcmodels.nn.linear import ColumnParallelLinear, RowParallelLinear
from funcmodels.nn.norm import LayerNorm, RMSNorm
from funcmodels.nn.ranks import vary
from funcmodels.nn.rotary import RotaryEmbedding
from funcmodels.nn.serve import to_vllm
from funcmodels.nn.vocab import ParallelLMHead, VocabParallelEmbedding
from funcmodels.nn.weights import load_whole, whole

__all__ = [
    "ColumnParallelLinear",
    "LayerNorm",
    "ParallelLMHead",
    "ParallelLayer",
    "RMSNorm",
    "RotaryEmbedding",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "load_whole",
    "to_vllm",
    "vary",
    "whole",
]
