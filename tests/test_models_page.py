"""The page of models marks what passed, and nothing else."""

from tools.models_page import ENGINE, FAILED, MODELS, PASSED, results_of, table

REPORT = """<testsuites><testsuite>
<testcase classname="tests.models.test_zoo" name="test_equals_transformers[qwen3--fp32]"/>
<testcase classname="tests.models.test_zoo" name="test_equals_transformers[qwen3-tied-fp32]"/>
<testcase classname="tests.models.test_zoo" name="test_equals_transformers[qwen3_moe--fp32]"/>
<testcase classname="tests.models.test_zoo" name="test_equals_transformers[qwen3_moe-a-fp32]">
<failure/></testcase>
<testcase classname="tests.engine.test_zoo" name="test_on_two_ranks[qwen3]"><skipped/></testcase>
<testcase classname="tests.engine.test_zoo" name="test_on_two_stages[qwen3]"><error/></testcase>
</testsuite></testsuites>"""


def test_marks(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    results = results_of([tmp_path / "report.xml"], ["qwen3", "qwen3_moe"])
    assert results == {
        (MODELS, "test_equals_transformers", "qwen3"): PASSED,
        (MODELS, "test_equals_transformers", "qwen3_moe"): FAILED,
        (ENGINE, "test_on_two_stages", "qwen3"): FAILED,
    }
    *_, row = table(results, {"qwen3": "Qwen3"})
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[0] == "Qwen3"
    assert [cell[:3] for cell in cells[1:]] == ["[✓]", "", "", "", "", "", "[✗]", "", ""]
    assert cells[1].startswith("[✓](../tests/models/test_zoo.py)")
