"""The operations of a model that torch has no single function for. All pure, all differentiable."""

from funcmodels.ops.attention import attention
from funcmodels.ops.embed import embed, unembed
from funcmodels.ops.glu import geglu, swiglu
from funcmodels.ops.loss import cross_entropy
from funcmodels.ops.moe import experts
from funcmodels.ops.norm import layer_norm, rms_norm
from funcmodels.ops.rope import rope
from funcmodels.ops.rope_frequencies import rope_frequencies

__all__ = [
    "attention",
    "cross_entropy",
    "embed",
    "experts",
    "geglu",
    "layer_norm",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "swiglu",
    "unembed",
]
