"""Mamba-2."""

import math
from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "mamba2",
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 16,
    "expand": 2,
    "state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 16,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": False,
}

SHARED: dict[str, Any] = {
    "model_type": "mamba2",
    "chunk_size": 256,
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "layer_norm_epsilon": 1e-05,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "state_size": 128,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, math.inf],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 256,
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
}
# Source: 2.7b and Codestral as copied in others' tests and benchmarks; 130m has the fields of 2.7b,
# and its sizes by its number of parameters alone.
PUBLISHED = {
    "mamba2-130m": Published(
        SHARED
        | {
            "hidden_size": 768,
            "n_groups": 1,
            "num_heads": 24,
            "num_hidden_layers": 24,
            "tie_word_embeddings": True,
            "vocab_size": 50288,
        },
        128_989_632,
    ),
    "mamba2-2.7b": Published(
        SHARED
        | {
            "hidden_size": 2560,
            "n_groups": 1,
            "num_heads": 80,
            "num_hidden_layers": 64,
            "tie_word_embeddings": True,
            "vocab_size": 50288,
        },
        2_702_599_680,
    ),
    "Mamba-Codestral-7B": Published(
        SHARED
        | {
            "hidden_size": 4096,
            "intermediate_size": 8192,
            "n_groups": 8,
            "norm_before_gate": True,
            "num_heads": 128,
            "num_hidden_layers": 64,
            "tie_word_embeddings": False,
            "time_step_init_scheme": "random",
            "time_step_scale": 1.0,
            "vocab_size": 32768,
        },
        7_285_403_648,
    ),
}


def norm_by_group(peer: Any) -> None:
    """Gives a mixer's norm its groups, as Zamba 2 has it; transformers' Mamba-2 has one for all."""
    from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

    for module in peer.modules():
        if type(module).__name__.endswith("RMSNormGated"):
            groups = getattr(peer.config, "n_groups", None) or peer.config.mamba_n_groups
            module.__class__ = Zamba2RMSNormGated
            module.group_size = len(module.weight) // groups


ROW = Row(
    module="mamba2",
    architecture="Mamba2ForCausalLM",
    hf=HF,
    variations={
        "one group": {"n_groups": 1},
        "bias": {"use_bias": True, "use_conv_bias": False},
        "tied": {"tie_word_embeddings": True},
        "narrow sum": {"residual_in_fp32": False},
        "limited": {"time_step_limit": [0.05, 0.5]},
    },
    published=PUBLISHED,
    faults={
        "eps": {"layer_norm_epsilon": 1e-3},
        "limit": {"time_step_limit": [0.05, 0.5]},
    },
    served=("one group", "limited"),
    linears=r"out_proj",  # in_proj is several layers
    vllm="mamba2:Mamba2ForCausalLM",
    engine_fault=(r"F\.softplus\(", "1.1 * F.softplus("),
    amend=norm_by_group,
    embeddings_first=False,
    # For its own class, vLLM looks up the block by the architecture's name, which the tests change.
    settings={"enable_prefix_caching": False, "mamba_block_size": 256},
)
