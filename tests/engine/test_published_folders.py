"""Folders as they are published, with a head or with images, served as they lie by the class."""

from __future__ import annotations

import json

import pytest
import torch

import funcmodels as fm
from tests.engine.harness import generate, make_llm, run_in_engine
from tests.engine.test_pooling import ask, wanted
from tests.engine.test_spawned import add_tokenizer
from tests.engine.tiny import PROMPTS, check, expected
from tests.models.folders import IMAGES, fields_of, published
from tests.models.zoo import rows


def test_the_text_model_of_gemma_3_with_images(tmp_path):
    """It takes no images; a window of another size in the text model's part is refused."""
    text = rows()["gemma3"].fields()
    published("Gemma3ForConditionalGeneration", tmp_path, text_config=text, **IMAGES)
    model = fm.load_model(tmp_path)
    want = expected(model, fm.load(model, tmp_path))

    def run():
        cls = fm.compile_to_vllm(model)
        served = generate(make_llm(tmp_path, model_cls=cls), PROMPTS, prompt_logprobs=True)
        config = json.loads((tmp_path / "config.json").read_text())
        config["text_config"]["sliding_window"] = 25
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"another config.json\n.*sliding_window=25"):
            make_llm(tmp_path, model_cls=cls)
        return served

    check(run_in_engine(run), want)


@pytest.mark.parametrize(
    ("architecture", "row"), [("BertForMaskedLM", "bert"), ("ModernBertForMaskedLM", "modernbert")]
)
def test_the_encoder_of_a_masked_language_model(architecture, row, tmp_path):
    published(architecture, tmp_path, **fields_of(row))
    add_tokenizer(tmp_path)
    model = fm.load_model(tmp_path, pooling="mean", normalize=True)
    want = wanted(model, fm.load(model, tmp_path))

    def run():
        cls = fm.compile_to_vllm(model)
        return ask(make_llm(tmp_path, model_cls=cls, skip_tokenizer_init=False))

    torch.testing.assert_close(run_in_engine(run), want, rtol=0, atol=3e-5)
