"""The longest files first: what is left for the end then fits on both processors."""

import pytest

# Minutes each, in one process. pytest-xdist starts files with many tests first, unless told not to.
LONGEST = ("test_spawned.py", "test_smollm2.py", "test_examples.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
