"""`fm.explain` on published configurations, at the numbers of ranks that people run them on.

Of Llama-3.1-405B, Qwen3-235B-A22B and DeepSeek-V3 see also test_explain.py, test_experts_explain.py
and test_latent_attention.py.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import funcmodels as fm
from tests.models.zoo import rows

CASES = [
    ("gpt_oss", "gpt-oss-120b", 8),
    ("glm4_moe", "GLM-4.5-Air", 4),
    ("llama", "Llama-3.1-405B", 8),
    ("gemma2", "gemma-2-27b", 4),
    ("gemma3", "gemma-3-27b-it, text_config", 8),
    ("mistral", "Mistral-Small-24B-Instruct-2501", 2),
    ("qwen2", "Qwen2.5-72B-Instruct", 8),
    ("qwen3", "Qwen3-32B", 4),
    ("qwen3_moe", "Qwen3-235B-A22B", 4),
    ("deepseek_v3", "DeepSeek-V3", 16),
]


@cache
def published(name: str, size: str) -> fm.Model:
    row = rows()[name]
    return row.zoo.model(row.zoo.Config.from_hf(row.published[size].config))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "tp"), CASES)
def test_ranks_together_hold_the_published_parameters_and_copies(name, size, tp):
    """Of what is not cut over the ranks, each of them has a copy; of all else there is one."""
    model = published(name, size)
    width = {path: (p.dtype or torch.bfloat16).itemsize for path, p in model.by_path.items()}
    wider = sum((width[path] - 2) * p.numel for path, p in model.by_path.items())
    copied = sum(
        width[path] * p.numel for path, p in model.by_path.items() if "tp" not in model.specs[path]
    )
    found = fm.explain(model, tp=tp)
    held = tp * sum(stage.weights for stage in found.stages)
    assert held == 2 * rows()[name].published[size].parameters + wider + (tp - 1) * copied


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (8, 1), (1, 8), (8, 8)])
def test_memory_of_a_rank_of_gpt_oss_120b(tp, ep):
    """Counted from its sizes: experts by ep, or else by tp, with the biases of what they add up."""
    layers, hidden, experts, heads = 36, 2880, 128, 64 * 64
    attention = hidden * (2 * heads + 2 * 512) + heads + 2 * 512 + 64  # biases and sinks
    tables = 2 * 201088 * hidden
    whole = layers * (experts * (hidden + 1) + 3 * hidden) + hidden  # routers, o_bias, norms
    matrices, biases = layers * experts * (3 * hidden**2 + 2 * hidden), layers * experts * hidden
    total = layers * attention + tables + whole + matrices + biases
    assert total == rows()["gpt_oss"].published["gpt-oss-120b"].parameters == 116_829_156_672
    want = (layers * attention + tables) // tp + whole + matrices // max(tp, ep) + biases // ep
    assert fm.explain(published("gpt_oss", "gpt-oss-120b"), tp=tp, ep=ep).weights == 2 * want


@pytest.mark.parametrize("tp", [8, 32])
def test_memory_of_a_rank_of_gemma_3_27b(tp):
    """16 key-value heads: on 32 ranks each is on two."""
    layers, hidden, heads, kv, mlp = 62, 5376, 32 * 128, 16 * 128, 21504
    cut = layers * (2 * heads * hidden + 3 * hidden * mlp) + 262208 * hidden
    cached, whole = layers * 2 * kv * hidden, layers * (4 * hidden + 2 * 128) + hidden
    size = "gemma-3-27b-it, text_config"
    assert cut + cached + whole == rows()["gemma3"].published[size].parameters
    # arXiv:2503.19786, table 1: 25,600M beside the embeddings.
    assert round((cut + cached + whole - 262208 * hidden) / 1e6) == 25_600
    want = cut // tp + cached // min(tp, 16) + whole
    assert fm.explain(published("gemma3", size), tp=tp).weights == 2 * want


@pytest.mark.parametrize(("tp", "ep"), [(8, 1), (4, 16)])
def test_memory_of_a_rank_of_glm_4_5(tp, ep):
    """The biases of its routers are in float32."""
    layers, dense, hidden, experts, heads, kv = 92, 3, 5120, 160, 96 * 128, 8 * 128
    mixed = layers - dense
    attention = 2 * heads * hidden + 2 * kv * hidden + heads + 2 * kv  # three biases
    shared = 3 * hidden * 1536
    cut = layers * attention + dense * 3 * hidden * 12288 + mixed * shared + 2 * 151552 * hidden
    whole = layers * (2 * hidden + 2 * 128) + hidden + mixed * experts * hidden
    each, biases = mixed * experts * 3 * hidden * 1536, mixed * experts
    total = cut + whole + each + biases
    assert total == rows()["glm4_moe"].published["GLM-4.5"].parameters
    want = cut // tp + whole + each // max(tp, ep)
    found = fm.explain(published("glm4_moe", "GLM-4.5"), tp=tp, ep=ep)
    assert found.weights == 2 * want + 4 * biases
