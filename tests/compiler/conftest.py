"""Settings of the compiler's tests, and texts that are compared with files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# torch logs each symbolic expression that tracing makes; pytest would keep them all.
logging.getLogger("torch.__trace").propagate = False

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare a text with a file below tests/golden, which tests.golden.regenerate writes."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / name
        if os.environ.get("FUNCMODELS_REGENERATE") == "1":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        assert file.exists(), f"{file.name} is missing: python -m tests.golden.regenerate"
        assert text == file.read_text(), "python -m tests.golden.regenerate, and look at the diff"

    return compare
