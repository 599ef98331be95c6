"""Write docs/models.md: what each model of the zoo was seen to do, from the results of its tests.

    pytest tests/models/test_zoo.py --junitxml=models.xml
    pytest tests/engine/test_zoo.py --junitxml=engine.xml
    python -m tools.models_page models.xml engine.xml

A cell is marked only where its tests ran and all passed; it links to the test.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
MODELS, ENGINE = "tests/models/test_zoo.py", "tests/engine/test_zoo.py"
# Heading -> the file and the function of the tests that it stands for.
COLUMNS = {
    "train": (MODELS, "test_equals_transformers"),
    "tensors": (MODELS, "test_tensors_are_written_back_bit_identical"),
    "serve": (ENGINE, "test_equals_the_pure_function"),
    "vLLM's own": (ENGINE, "test_equals_vllms_own_class"),
    "bfloat16": (ENGINE, "test_in_bfloat16"),
    "tp, compile": (ENGINE, "test_on_two_ranks"),
    "pp": (ENGINE, "test_on_two_stages"),
    "LoRA": (ENGINE, "test_an_adapter_equals_merged_weights"),
    "int8": (ENGINE, "test_in_int8_it_equals_vllms_own_class"),
}
PASSED, FAILED, ABSENT = "✓", "✗", ""

TEXT = """# Models of the zoo

*Written by `python -m tools.models_page` from the results of the tests. Do not edit.*

Each model is one file of [funcmodels/models](../funcmodels/models). A mark says that the tests it
links to ran and passed, with small random weights; an empty cell that there is no such test. Which
checkpoints were run with their own weights, each file's docstring says.

- **train**: logits, hidden states and gradients equal `transformers`, in float32 and bfloat16
  (`test_equals_transformers`).
- **tensors**: a checkpoint that `transformers` wrote is loaded and written back bit for bit
  (`test_tensors_are_written_back_bit_identical`).
- **serve**: log probabilities, or vectors, of the emitted class equal the pure function's on the
  engine, on a CPU, with prompts longer than windows and blocks, several in a batch, in pieces
  (`test_equals_the_pure_function`).
- **vLLM's own**: and those of vLLM's own class (`test_equals_vllms_own_class`).
- **bfloat16**: and as near to float32 as the pure function in bfloat16 is; of an encoder, a dense
  model, a mixture and one with states (`test_in_bfloat16`).
- **tp, compile**: the same on two tensor-parallel ranks, traced as one graph (`test_on_two_ranks`).
- **pp**: the same on two pipeline stages (`test_on_two_stages`).
- **LoRA**: an adapter equals merged weights (`test_an_adapter_equals_merged_weights`).
- **int8**: a compressed-tensors checkpoint equals vLLM's own class
  (`test_in_int8_it_equals_vllms_own_class`).

"""

Results = Mapping[tuple[str, str, str], str]  # file, function, row -> mark


def results_of(reports: Iterable[Path], rows: Iterable[str]) -> Results:
    """What the reports say of each test of each row; one failure outweighs all else."""
    names = sorted(rows, key=len, reverse=True)
    seen: dict[tuple[str, str, str], set[bool]] = defaultdict(set)
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            found = re.fullmatch(r"(\w+)\[(.*)\]", case.get("name", ""))
            if found is None or case.find("skipped") is not None:
                continue
            file = case.get("classname", "").replace(".", "/") + ".py"
            case_id = found[2]
            row = next((n for n in names if case_id == n or case_id.startswith(f"{n}-")), None)
            is_good = case.find("failure") is None and case.find("error") is None
            if row is not None:
                seen[file, found[1], row].add(is_good)
    return {key: PASSED if all(good) else FAILED for key, good in seen.items()}


def table(results: Results, titles: Mapping[str, str]) -> list[str]:
    """The rows of the page: a model, and a linked mark for each column."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for row, title in titles.items():
        cells = []
        for test in COLUMNS.values():
            mark = results.get((*test, row), ABSENT)
            cells.append(f"[{mark}](../{test[0]})" if mark else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def main(reports: list[str]) -> int:
    from tests.models.zoo import rows

    if not reports:
        print(__doc__)
        return 1
    titles = {}
    for name, row in rows().items():
        file = f"[{row.architecture}](../funcmodels/models/{row.module}.py)"
        titles[name] = f"{file}: {', '.join(size.partition(',')[0] for size in row.published)}"
    results = results_of(map(Path, reports), titles)
    PAGE.write_text(TEXT + "\n".join(table(results, titles)) + "\n")
    print(f"{PAGE}: {len(titles)} models, {[*results.values()].count(FAILED)} failures")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
