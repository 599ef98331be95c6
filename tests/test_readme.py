"""The README's example is examples/hello.py, which tests/test_examples.py runs; links lead on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import funcmodels as fm
from funcmodels import ops

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design")


def pages() -> list[Path]:
    found = [ROOT / name for name in PAGES]
    return [p for path in found for p in ([path] if path.is_file() else sorted(path.glob("*.md")))]


def test_example_is_the_one_that_runs():
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    _, _, code = (ROOT / "examples" / "hello.py").read_text().split('"""', 2)
    assert block.strip() == code.strip()


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_links_and_paths_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    paths = re.findall(r"`((?:tests|compiler|funcmodels|examples|docs|tools)/[\w./-]*)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_make_targets_exist():
    targets = re.findall(
        r"`make (\w+)`|^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    makefile = (ROOT / "Makefile").read_text()
    for target in {a or b for a, b in targets}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_all_that_can_be_called_is_named():
    """Classes but for `Model` are what functions return: their docstrings name them."""
    text = (ROOT / "README.md").read_text()
    public = [f"fm.{name}" for name in fm.__all__ if name[0].islower()]
    public += [f"ops.{name}" for name in ops.__all__]
    missing = [name for name in public if not re.search(rf"`@?{name}\b", text)]
    assert not set(missing) - {"fm.errors", "fm.ops"}
