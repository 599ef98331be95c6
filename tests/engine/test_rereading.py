"""Tokens that are read in several ways reach the layers; prompts as embeddings are refused."""

import pytest

import funcmodels as fm
from tests.engine.rereading import model
from tests.engine.tiny import PROMPTS, check, distance, expected, saved, serve_model, weights_of


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rereading")
    return folder, expected(model, saved(model, folder))


@pytest.mark.parametrize(("tp", "compiled"), [(1, False), (2, False), (1, "trace")])
def test_equals_the_pure_function(case, tp, compiled):
    folder, want = case
    check(serve_model(model, folder, tp=tp, compiled=compiled), want)


FAULTS = {
    "hashes of 32 bits": ("input_ids = input_ids.long()", "input_ids = input_ids"),
    "another hash": ("* 2654435761", "* 2654435769"),
    "layers of token 0": ("self.embed(tokens)", "self.embed(tokens * 0)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(case, fault):
    folder, want = case
    served = serve_model(model, folder, edit=lambda source: source.replace(*FAULTS[fault]))
    assert distance(served, want) > 1e-3


def test_prompts_as_embeddings_are_refused(case):
    said = r"reads the tokens in other ways(.|\n)*fix: +enable_prompt_embeds=False"
    with pytest.raises(ValueError, match=said):
        serve_model(model, case[0], enable_prompt_embeds=True)


def test_verify_and_explain():
    fm.verify(model, weights_of(model), PROMPTS)
    found = fm.explain(model, tp=2)
    tables = [p for block in found.blocks for p in block.parameters if "hashed" in p.paths]
    assert [p.bytes for p in tables] == [128 * 128 * 2 // 2]  # of 97 rows, padded to 128, half
