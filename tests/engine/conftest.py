"""Tests on the real vLLM engine: skipped where it is not installed."""

import importlib.util
import sys
from collections.abc import Iterator
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
            item.add_marker(pytest.mark.xdist_group(_group(item)))
            if not has_vllm:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


def _group(item: pytest.Item) -> str:
    """What runs in one process with others: they share engines by file, and in the zoo by model."""
    params = getattr(item, "callspec", None)
    name = params.params.get("name", "") if params is not None else ""
    return f"{item.path.name} {name}"


def pytest_collection_finish() -> None:
    """vLLM's loggers keep the stream of their import: one of the collection's is closed later."""
    assert "vllm" not in sys.modules, "a test module imports vLLM: let the engine's process do so"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Emitted files and persisted registrations of the tests, apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FUNCMODELS_CACHE", str(folder))
        patch.delenv("FUNCMODELS_REGISTERED", raising=False)
        yield folder
