"""The models that are served: SmolLM2-135M-Instruct, and published shapes with random weights."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import funcmodels as fm
from examples.smollm2 import cache_folder, convert


@dataclass(frozen=True)
class Shape:
    """A model to serve.

    Args:
        title: what it is.
        peer: vLLM's own class for it.
        hf: config.json, for random weights; None for the one with real ones.
        tps: the numbers of ranks that divide it.
        backend: vLLM's transformers backend serves it too.
    """

    title: str
    peer: str
    hf: dict[str, Any] | None = None
    tps: tuple[int, ...] = (1, 2)
    backend: bool = True

    def folder(self) -> Path:
        """Its folder, made once and kept in the user's cache."""
        if self.hf is None:
            return convert()
        text = json.dumps(self.hf, indent=2, sort_keys=True)
        folder = cache_folder() / "benchmarks" / self.hf["model_type"]
        config = folder / "config.json"
        if not config.exists() or config.read_text() != text:
            _make(self.hf, folder)
            config.write_text(text)  # last: a folder that has it is whole
        return folder


def _make(hf: dict[str, Any], folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(hf))
        model = fm.load_model(name)
    fm.save(model, fm.init(model, seed=0, dtype=torch.bfloat16), folder)
    os.remove(folder / "config.json")  # vLLM's own class is to be found by the published one


QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32_768,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
GEMMA3 = {  # the published sizes of Gemma 3 270M, but for the vocabulary
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 65_536,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "layer_types": [
        "full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(18)
    ],
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 32_768,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 512,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LFM2 = {  # the published sizes of LFM2-350M, but half its layers and half its vocabulary
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "vocab_size": 32_768,
    "hidden_size": 1024,
    "intermediate_size": 6656,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "layer_types": ["full_attention" if layer in (2, 5, 7) else "conv" for layer in range(8)],
    "conv_L_cache": 3,
    "conv_bias": False,
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    # vLLM's own class looks at these.
    "block_dim": 1024,
    "conv_dim": 1024,
    "conv_dim_out": 1024,
}
MAMBA2 = {  # the published sizes of Mamba-2 130M, but half its layers, fewer words
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "vocab_size": 32_768,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_heads": 24,
    "head_dim": 64,
    "expand": 2,
    "state_size": 128,
    "n_groups": 1,
    "conv_kernel": 4,
    "chunk_size": 256,
    "hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": False,
    "rms_norm": True,
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "smollm2": Shape("SmolLM2-135M", "vLLM Llama", tps=(1,)),
    "qwen3": Shape("Qwen3 of 147M", "vLLM Qwen3", QWEN3),
    "gemma3": Shape("Gemma 3 of 142M", "vLLM Gemma3", GEMMA3),
    "qwen3_moe": Shape("Qwen3-MoE of 180M", "vLLM Qwen3Moe", QWEN3_MOE),
}
RECURRENT = {
    "lfm2": Shape("LFM2 of 178M", "vLLM Lfm2", LFM2, backend=False),
    "mamba2": Shape("Mamba-2 of 70M", "vLLM Mamba2", MAMBA2, backend=False),
}
