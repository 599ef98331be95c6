"""The operations of a model that torch has no single function for. All pure, all differentiable."""

from funcmodels.ops.associative_scan import associative_scan
from funcmodels.ops.attention import attention
from funcmodels.ops.delta_rule import gated_delta_rule
from funcmodels.ops.einsum import einsum
from funcmodels.ops.embed import embed, unembed
from funcmodels.ops.glu import geglu, swiglu
from funcmodels.ops.latent_attention import latent_attention
from funcmodels.ops.linear_attention import gated_linear_attention
from funcmodels.ops.loss import cross_entropy
from funcmodels.ops.moe import experts
from funcmodels.ops.norm import layer_norm, rms_norm
from funcmodels.ops.recurrent import recurrent
from funcmodels.ops.rope import rope
from funcmodels.ops.rope_frequencies import rope_frequencies
from funcmodels.ops.short_conv import short_conv
from funcmodels.ops.ssd import ssd

__all__ = [
    "associative_scan",
    "attention",
    "cross_entropy",
    "einsum",
    "embed",
    "experts",
    "gated_delta_rule",
    "gated_linear_attention",
    "geglu",
    "latent_attention",
    "layer_norm",
    "recurrent",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "short_conv",
    "ssd",
    "swiglu",
    "unembed",
]
