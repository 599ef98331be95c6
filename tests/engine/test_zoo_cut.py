"""Variations that change what is cut, several at once, on two tensor-parallel ranks.

tests/engine/test_zoo.py serves variations one by one on one rank, and each row as it is on two.
Here heads of keys are fewer than ranks or as many as of queries, tables are tied or not, and
biases, norms of heads, slopes of ALiBi and groups of states are cut, or are on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import funcmodels as fm
from tests.engine.harness import run_in_engine
from tests.engine.test_spawned import add_tokenizer
from tests.engine.test_zoo import Answer, answer, apart, oracle, same
from tests.engine.tiny import register
from tests.models.zoo import rows

Edit = Callable[[str], str]
CUT = {
    "cohere": [("mqa", "qk-norm", "bias", "linear")],
    "deepseek_v2": [("lite", "bias", "tied")],
    "deepseek_v3": [("one group", "bias", "plain rope")],
    "falcon": [("7b",), ("rw",), ("mha", "bias", "untied", "linear")],
    "gemma2": [("mqa", "untied", "bias", "no-softcaps")],
    "gemma3": [("mha", "untied", "bias", "linear")],
    "glm4_moe": [("mqa", "tied", "groups", "whole heads")],
    "gpt2": [("untied", "inner")],
    "gpt_neox": [("tied", "no-bias", "half")],
    "gpt_oss": [("mha", "tied", "all full")],
    "granite": [("mqa", "tied", "bias", "linear")],
    "granite_moe_hybrid": [("dense", "bias"), ("mixers",)],
    "lfm2": [("bias", "untied", "wider")],
    "mamba2": [("one group", "tied", "bias")],
    "mistral": [("mqa", "tied", "no-window", "wide-heads")],
    "mixtral": [("mha", "tied", "window")],
    "modernbert": [("biases", "every third")],
    "olmo2": [("mqa", "tied", "bias", "yarn")],
    "olmoe": [("gqa", "tied", "clipped")],
    "phi3": [("mqa", "tied", "longrope-partial"), ("mha", "no-window")],
    "qwen2": [("mha", "tied", "window")],
    "qwen3": [("mqa", "tied", "bias", "window", "yarn")],
    "qwen3_moe": [("tied", "bias", "every second")],
    "qwen3_next": [("other heads", "bias, tied")],
    "smollm3": [("mqa", "tied", "bias", "window", "list")],
    "starcoder2": [("mqa", "tied", "no-bias")],
}
CASES = [pytest.param(name, some, id=f"{name}-{'+'.join(some)}")
         for name, cases in CUT.items() for some in cases]  # fmt: skip


def varied(name: str, some: tuple[str, ...]) -> fm.Model:
    """The tiny model of a row with the fields of several variations."""
    row = rows()[name]
    fields: dict[str, Any] = {}
    for variation in some:
        fields |= row.variations[variation]
    return row.model(**fields)


def serve(name: str, some: tuple[str, ...], folder: Path, edit: Edit | None = None) -> Any:
    """What two ranks answer, and what they should."""
    row, model = rows()[name], varied(name, some)
    weights = row.weights(model)
    fm.save(model, weights, folder)
    add_tokenizer(folder)

    def run() -> Answer:
        register(model, edit)
        return answer(row, model, folder, tp=2)

    return run_in_engine(run), oracle(model)(model, weights)


@pytest.mark.parametrize(("name", "some"), CASES)
def test_on_two_ranks(name, some, tmp_path):
    same(*serve(name, some, tmp_path))


FIRST = "lambda param, weight: param.data.copy_(weight[: len(param)])}"
FAULTS = {
    "slopes": ("falcon", ("rw",), "values[get_tensor_model_parallel_rank() * n", "values[0"),
    "norms": ("olmo2", ("mqa", "bias"), "sharded_weight_loader(0)}", FIRST),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, tmp_path):
    """Every rank has those of the first one's heads."""
    name, some, right, wrong = FAULTS[fault]
    assert apart(*serve(name, some, tmp_path, lambda text: text.replace(right, wrong))) > 1e-3
