"""The page of models marks what ran and passed, and nothing else; it has every model and size."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.models.zoo import rows
from tools import models_page
from tools.models_page import (
    BEGIN,
    CANNOT,
    COLUMNS,
    END,
    ENGINE,
    FAILED,
    MODELS,
    NOT_RUN,
    PAGE,
    PASSED,
    README,
    ROOT,
    between,
    mark_of,
    number_of_cases,
    results_of,
)

COLUMN = {column.title: column for column in COLUMNS}


def case(file: str, name: str, outcome: str = "") -> str:
    module = file.removesuffix(".py").replace("/", ".")
    return f'<testcase classname="{module}" name="{name}">{outcome}</testcase>'


def marks(tmp_path, *cases: str) -> dict[str, str]:
    """Of qwen3's cells, after a report."""
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    results = results_of([report], rows())
    return {column.title: mark_of(column, "qwen3", results) for column in COLUMNS}


def test_marks(tmp_path):
    """Of a test that passed, of one that was skipped, of one that failed in part, of none."""
    found = marks(
        tmp_path,
        case(ENGINE, "test_on_two_ranks[qwen3]"),
        case(ENGINE, "test_on_two_stages[qwen3]", "<skipped/>"),
        case(ENGINE, "test_in_bfloat16[qwen3]", "<error/>"),
        case(ENGINE, "test_equals_the_pure_function[qwen3-]"),
        case(ENGINE, "test_equals_the_pure_function[qwen3-a]", "<failure/>"),
        case(ENGINE, "test_an_adapter_equals_merged_weights[qwen3_moe]"),
    )
    assert found["tp"] == found["compile"] == PASSED
    assert found["pp"] == found["train"] == found["LoRA"] == NOT_RUN
    assert found["bfloat16"] == found["serve"] == FAILED


def test_a_cell_needs_all_of_its_cases(tmp_path):
    row = rows()["qwen3"]
    both = [f"test_equals_transformers[qwen3-{variation}-{dtype}]"
            for variation in ("", *row.variations) for dtype in ("fp32", "bf16")]  # fmt: skip
    assert number_of_cases(COLUMN["train"].function, "qwen3") == len(both)
    assert marks(tmp_path, *(case(MODELS, n) for n in both))["train"] == PASSED
    assert marks(tmp_path, *(case(MODELS, n) for n in both[1:]))["train"] == NOT_RUN


def test_where_there_can_be_no_test_a_note_says_why(tmp_path):
    assert mark_of(COLUMN["vLLM's own"], "gpt_neox", {}) == CANNOT
    assert mark_of(COLUMN["bfloat16"], "gpt_neox", {}) == ""
    filled = {name: {column.title: "" for column in COLUMNS} for name in rows()}
    filled["gpt_neox"]["vLLM's own"] = CANNOT
    text = models_page.page(filled)
    assert f"{CANNOT}[^1]" in text
    assert "[^1]: vLLM 0.32 has none" in text


@pytest.mark.slow
def test_the_number_of_cases_is_what_pytest_collects():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", MODELS, ENGINE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ids = re.findall(r"^(\S+?::\w+)\[(.*?)\]", done.stdout, re.MULTILINE)
    names = sorted(rows(), key=len, reverse=True)
    found = Counter(
        (test, next((n for n in names if f"{of}-".startswith(f"{n}-")), "")) for test, of in ids
    )
    for column in COLUMNS:
        for name in rows():
            assert found[column.key, name] == number_of_cases(column.function, name)


def page_cells() -> dict[str, list[str]]:
    """The cells of each row of docs/models.md, by its title."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| [")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {first: rest for first, *rest in cells}


STALE = "docs/models.md is not of these tests: make models"


def test_the_page_has_every_model_and_every_size():
    titles = list(page_cells())
    assert len(titles) == len(rows()), STALE
    for title, row in zip(titles, rows().values(), strict=True):
        assert title.startswith(models_page.title_of(row)), STALE
        sizes = [size.partition(",")[0] for size in row.published]
        assert title.endswith(f": {', '.join(sizes)}"), STALE


def test_a_cell_of_the_page_is_filled_where_there_is_a_test():
    for (name, row), cells in zip(rows().items(), page_cells().values(), strict=True):
        for column, cell in zip(COLUMNS, cells, strict=True):
            where = f"{STALE}; {name}, {column.title}: {cell!r}"
            if number_of_cases(column.function, name):
                assert re.fullmatch(rf"\[[✓✗?]\]\[{column.title}\]", cell), where
            else:
                assert bool(re.fullmatch(rf"{CANNOT}\[\^\d+\]", cell)) == bool(
                    column.why_not(row)
                ), where
                assert bool(cell) == bool(column.why_not(row)), where


def test_links_lead_to_tests():
    text = PAGE.read_text()
    for column in COLUMNS:
        assert hasattr(column.function, "pytestmark")
        [line] = re.findall(rf'\[{column.title}\]: \.\./(\S+)#L\d+ "{column.key}"', text)
        assert line == column.file


def test_readme_has_every_model_and_the_marks_of_the_page():
    _, rest = README.read_text().split(BEGIN)
    table, _ = rest.split(END)
    head, _, *lines = table.splitlines()
    titles = [cell.strip() for cell in head.split("|")[2:-1]]
    page = dict(zip(rows(), page_cells().values(), strict=True))
    seen = []
    for line in lines:
        names, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        for module in re.findall(r"\[(\w+)\]\(", names):
            [name] = [n for n, row in rows().items() if row.module == module]
            seen.append(name)
            whole = dict(zip(COLUMN, page[name], strict=True))
            assert cells == [re.sub(r"\[\^\d+\]|\]\[.*|^\[", "", whole[t]) for t in titles], name
    assert sorted(seen) == sorted(rows()), STALE


def test_between():
    assert between(f"a{BEGIN}old{END}b", "new") == f"a{BEGIN}new{END}b"
