"""Tests on the real vLLM engine: skipped where it is not installed."""

import importlib.util
from pathlib import Path

import pytest
import torch

# GNU OpenMP's pool does not survive the fork that each engine test runs in: no parallel region may
# have run before. This file is imported at collection, before any test of the session runs.
torch.set_num_threads(1)

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_vllm = importlib.util.find_spec("vllm") is not None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if not has_vllm:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
