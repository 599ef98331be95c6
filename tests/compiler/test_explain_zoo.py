"""`fm.explain` on published configurations, at the numbers of ranks that people run them on."""

import pytest
import torch

import funcmodels as fm
from tests.models.zoo import rows

pytestmark = pytest.mark.slow
CASES = [
    ("llama", "Llama-3.1-405B", 8),
    ("gemma2", "gemma-2-27b", 4),
    ("gemma3", "gemma-3-27b-it, text_config", 8),
    ("mistral", "Mistral-Small-24B-Instruct-2501", 2),
    ("qwen2", "Qwen2.5-72B-Instruct", 8),
    ("qwen3", "Qwen3-32B", 4),
    ("qwen3_moe", "Qwen3-235B-A22B", 4),
    ("deepseek_v3", "DeepSeek-V3", 16),
]


@pytest.mark.parametrize(("name", "size", "tp"), CASES)
def test_ranks_together_hold_the_published_parameters_and_copies(name, size, tp):
    """Of what is not cut over the ranks, each of them has a copy; of all else there is one."""
    row = rows()[name]
    model = row.zoo.model(row.zoo.Config.from_hf(row.published[size].config))
    width = {path: (p.dtype or torch.bfloat16).itemsize for path, p in model.by_path.items()}
    wider = sum((width[path] - 2) * p.numel for path, p in model.by_path.items())
    copied = sum(
        width[path] * p.numel for path, p in model.by_path.items() if "tp" not in model.specs[path]
    )
    found = fm.explain(model, tp=tp)
    held = tp * sum(stage.weights for stage in found.stages)
    assert held == 2 * row.published[size].parameters + wider + (tp - 1) * copied
