"""Numbers and widths of heads, and tied tables, that configs allow and no row's variations have."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.models.test_zoo import compare
from tests.models.zoo import rows

torch.set_num_threads(1)

MHA, MQA = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}
WIDE = {"head_dim": 48}  # 4 heads of 48 are wider than hidden_size, 128
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
OTHERS = {
    "cohere": {"untied": UNTIED},
    "deepseek_v3": {"tied": TIED},
    "gemma2": {"mha": MHA, "wide": WIDE},
    "gemma3": {"wide": WIDE},
    "glm4_moe": {"wide": WIDE},
    "gpt_oss": {"mqa": MQA, "wide": WIDE},
    "granite": {"wide": WIDE},
    "granite_moe_hybrid": {"mha": MHA, "mqa": MQA},
    "lfm2": {"mha": MHA, "mqa": MQA},
    "llama": {"mha": MHA, "mqa": MQA, "wide": WIDE},
    "mixtral": {"mqa": MQA, "wide": WIDE},
    "olmo2": {"wide": WIDE},
    "olmoe": {"mqa": MQA},
    "phi3": {"wide": WIDE},
    "qwen2": {"wide": WIDE},
    "qwen3": {"wide": WIDE},
    "qwen3_moe": {"mha": MHA, "mqa": MQA, "wide": WIDE},
    "qwen3_next": {"mha": MHA, "mqa": MQA, "wide": WIDE},
    "smollm3": {"wide": WIDE},
    "starcoder2": {"wide": WIDE},
}
DTYPES = [pytest.param(torch.float32, id="fp32"),
          pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.slow)]  # fmt: skip
CASES = [(name, other) for name, others in OTHERS.items() for other in others]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "other"), CASES)
def test_equals_transformers(name, other, dtype, tmp_path):
    """Logits, hidden states and gradients."""
    row = rows()[name]
    other_row = dataclasses.replace(row, hf=row.fields(**OTHERS[name][other]))
    assert other_row.model().config != row.model().config
    compare(other_row, tmp_path, dtype)
