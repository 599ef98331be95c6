"""Write docs/models.md and README's short form of it, from the results of the zoo's tests.

    make models

runs these tests, and then `python -m tools.models_page REPORT.xml ...` on their reports, as
`pytest --junitxml` writes them. A cell is marked only where all of its tests ran and passed.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.models.zoo import Row, rows

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "models.md", ROOT / "README.md"
MODELS, ENGINE = "tests/models/test_zoo.py", "tests/engine/test_zoo.py"
PASSED, FAILED, NOT_RUN, CANNOT = "✓", "✗", "?", "–"
BEGIN, END = "<!-- by tools.models_page -->\n", "<!-- until here -->\n"


@dataclass(frozen=True)
class Column:
    """A heading, and the test that its cells stand for.

    Args:
        why_not: why a row has no such test; "" where it has, or where nothing is known.
        is_short: whether README has it, too.
    """

    title: str
    file: str
    test: str
    about: str
    why_not: Callable[[Row], str] = lambda row: ""
    is_short: bool = True

    @property
    def key(self) -> str:
        return f"{self.file}::{self.test}"

    @property
    def function(self) -> Callable[..., Any]:
        module = self.file.removesuffix(".py").replace("/", ".")
        return getattr(importlib.import_module(module), self.test)


COLUMNS = (
    Column(
        "train",
        MODELS,
        "test_equals_transformers",
        "logits, hidden states and gradients equal `transformers`, in float32 and bfloat16",
    ),
    Column(
        "tensors",
        MODELS,
        "test_tensors_are_written_back_bit_identical",
        "a checkpoint that `transformers` wrote is loaded and written back bit for bit",
        is_short=False,
    ),
    Column(
        "serve",
        ENGINE,
        "test_equals_the_pure_function",
        "log probabilities, or vectors, of the emitted class equal the pure function's on the "
        "engine, on a CPU, with prompts longer than windows and blocks, several in a batch, in "
        "pieces",
    ),
    Column(
        "vLLM's own",
        ENGINE,
        "test_equals_vllms_own_class",
        "and those of vLLM's own class",
        lambda row: row.no_vllm,
        is_short=False,
    ),
    Column(
        "bfloat16",
        ENGINE,
        "test_in_bfloat16",
        "and as near to float32 as the pure function in bfloat16 is; of an encoder, a dense model, "
        "a mixture and those with states",
        is_short=False,
    ),
    Column("tp", ENGINE, "test_on_two_ranks", "the same on two tensor-parallel ranks"),
    Column(
        "pp",
        ENGINE,
        "test_on_two_stages",
        "the same on two pipeline stages",
    ),
    Column(
        "LoRA",
        ENGINE,
        "test_an_adapter_equals_merged_weights",
        "an adapter equals merged weights",
        lambda row: row.no_adapters,
    ),
    Column(
        "quantised",
        ENGINE,
        "test_in_int8_it_equals_vllms_own_class",
        "a compressed-tensors checkpoint in int8 equals vLLM's own class",
        lambda row: row.no_int8,
    ),
    Column(
        "compile",
        ENGINE,
        "test_on_two_ranks",
        "Dynamo traces the class as one graph, on each of two ranks; what it traced ran eagerly in "
        "this test, not through Inductor",
    ),
)

TEXT = """# Models of the zoo

*Written by `make models` from the results of the tests. Do not edit.*

Each model is one file of [funcmodels/models](../funcmodels/models). ✓ says that all cases of the
column's test ran for this model and passed, with small random weights; ✗ that one failed; ? that
not all of them ran. – says that there is no such test, and a note says why; an empty cell, that
there is none. Which checkpoints were run with their own weights, each file's docstring says.

"""

Results = Mapping[tuple[str, str], Mapping[str, bool]]  # test, row -> case -> whether it passed


def results_of(reports: Iterable[Path], names: Iterable[str]) -> Results:
    """What the reports say of each case of each row; one failure outweighs all else."""
    longest_first = sorted(names, key=len, reverse=True)
    seen: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            found = re.fullmatch(r"(\w+)\[(.*)\]", case.get("name", ""))
            if found is None or case.find("skipped") is not None:
                continue
            name = next((n for n in longest_first if f"{found[2]}-".startswith(f"{n}-")), None)
            if name is None:
                continue
            file = case.get("classname", "").replace(".", "/") + ".py"
            is_good = case.find("failure") is None and case.find("error") is None
            cases = seen[f"{file}::{found[1]}", name]
            cases[found[2]] = cases.get(found[2], True) and is_good
    return seen


def number_of_cases(function: Callable[..., Any], name: str) -> int:
    """How many cases of a parametrised test are of a row."""
    count = 1
    for mark in (m for m in vars(function)["pytestmark"] if m.name == "parametrize"):
        arguments, values = mark.args
        arguments = [arguments] if isinstance(arguments, str) else list(arguments)
        if "name" in arguments:
            at = arguments.index("name")
            values = [v for v in values if (v if len(arguments) == 1 else v[at]) == name]
        count *= len(values)
    return count


def mark_of(column: Column, name: str, results: Results) -> str:
    """Of a cell."""
    cases = results.get((column.key, name), {})
    need = number_of_cases(column.function, name)
    if not all(cases.values()):
        return FAILED
    if need:
        return PASSED if len(cases) == need else NOT_RUN
    return CANNOT if column.why_not(rows()[name]) else ""


def page(marks: Mapping[str, Mapping[str, str]]) -> str:
    """The page, of the marks of each row by column."""
    lines = [f"- **{c.title}**: {c.about} ([`{c.test}`][{c.title}])." for c in COLUMNS]
    titles = [c.title for c in COLUMNS]
    lines += ["", f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    notes: dict[str, int] = {}
    for name, row in rows().items():
        cells = [f"{title_of(row)}: {', '.join(size.partition(',')[0] for size in row.published)}"]
        for column in COLUMNS:
            mark = marks[name][column.title]
            if mark == CANNOT:
                note = notes.setdefault(column.why_not(row), len(notes) + 1)
                cells.append(f"{CANNOT}[^{note}]")
            else:
                cells.append(f"[{mark}][{column.title}]" if mark else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"[^{n}]: {why}." for why, n in notes.items()), ""]
    for column in COLUMNS:
        line = inspect.unwrap(column.function).__code__.co_firstlineno
        lines.append(f'[{column.title}]: ../{column.file}#L{line} "{column.key}"')
    return TEXT + "\n".join(lines) + "\n"


def title_of(row: Row) -> str:
    return f"[{row.architecture}](../funcmodels/models/{row.module}.py)"


def short_form(marks: Mapping[str, Mapping[str, str]]) -> str:
    """README's table: the models of the same marks in one row."""
    titles = [c.title for c in COLUMNS if c.is_short]
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, row in rows().items():
        link = f"[{row.module}](funcmodels/models/{row.module}.py)"
        alike[tuple(marks[name][title] for title in titles)].append(link)
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    by_number = sorted(alike.items(), key=lambda item: -len(item[1]))
    lines += [f"| {', '.join(links)} | {' | '.join(cells)} |" for cells, links in by_number]
    return "\n".join(lines) + "\n"


def between(text: str, new: str) -> str:
    """The text with something new between its two marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{new}{END}{after}"


def main(reports: list[str]) -> int:
    if not reports:
        print(__doc__)
        return 1
    results = results_of(map(Path, reports), rows())
    marks = {name: {c.title: mark_of(c, name, results) for c in COLUMNS} for name in rows()}
    PAGE.write_text(page(marks))
    README.write_text(between(README.read_text(), short_form(marks)))
    bad = [f"{name}: {title} {mark}" for name, cells in marks.items()
           for title, mark in cells.items() if mark in (FAILED, NOT_RUN)]  # fmt: skip
    print(
        f"{PAGE}: {len(marks)} models, {len(bad)} cells that failed or did not run", *bad, sep="\n"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
