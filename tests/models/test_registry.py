"""Which model reads a folder: those published with a head or with images, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import funcmodels as fm
from funcmodels.errors import ConfigError
from funcmodels.models import gemma3
from tests.models.folders import IMAGES, fields_of, published
from tests.models.zoo import rows

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

TOKENS = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(40).expand(2, 40)

# transformers' class -> our row, whose sizes it takes, and how its encoder is reached.
HEADED = {
    "BertForMaskedLM": "bert",
    "BertForPreTraining": "bert",
    "ModernBertForMaskedLM": "modernbert",
    "LlamaForCausalLM": "llama_embedding",
    "MistralForCausalLM": "mistral_embedding",
    "Qwen3ForCausalLM": "qwen3_embedding",
}


@pytest.mark.parametrize("architecture", HEADED)
def test_the_encoder_of_a_model_with_a_head(architecture, tmp_path):
    """It computes transformers' hidden states, and is written as one without a head."""
    peer = published(architecture, tmp_path / "theirs", **fields_of(HEADED[architecture]))
    model = fm.load_model(tmp_path / "theirs", pooling="mean")
    assert (model.task, model.pooling, model.normalize) == ("embed", "mean", False)
    weights = fm.load(model, tmp_path / "theirs")
    with torch.no_grad():
        want = peer.base_model(TOKENS).last_hidden_state
        torch.testing.assert_close(
            model.forward(weights, TOKENS, POSITIONS), want, rtol=1e-4, atol=3e-5
        )
    fm.save(model, weights, tmp_path / "ours")
    again = fm.load_model(tmp_path / "ours")
    assert (again.name, again.pooling, again.config) == (model.name, "mean", model.config)
    same = fm.tree.map(torch.equal, fm.load(again, tmp_path / "ours"), weights)
    assert all(fm.tree.leaves(same))
    encoder = getattr(transformers, rows()[HEADED[architecture]].architecture)
    with torch.no_grad():
        read = encoder.from_pretrained(tmp_path / "ours")(TOKENS).last_hidden_state
    torch.testing.assert_close(read, want)


def test_a_masked_language_model_is_no_encoder_unless_asked_for(tmp_path):
    """Its own head is what it was published for: it is not dropped without a word."""
    published("ModernBertForMaskedLM", tmp_path, **fields_of("modernbert"))
    with pytest.raises(ConfigError, match=r"no model with the head(.|\n)*pooling=\"mean\""):
        fm.load_model(tmp_path)
    assert fm.load_model(tmp_path, pooling="cls", normalize=True).normalize


def test_the_text_model_of_gemma_3_with_images(tmp_path):
    """Logits of text are the whole model's; it is written as a model of text."""
    text = rows()["gemma3"].fields() | {"vocab_size": 256}
    peer = published("Gemma3ForConditionalGeneration", tmp_path / "a", text_config=text, **IMAGES)
    model = fm.load_model(tmp_path / "a")
    weights = fm.load(model, tmp_path / "a")
    with torch.no_grad():
        want = peer(TOKENS).logits
        got = model.forward(weights, TOKENS, POSITIONS)
    assert want.square().mean() > 0.25
    torch.testing.assert_close(got, want, rtol=1e-4, atol=3e-5)
    fm.save(model, weights, tmp_path / "b")
    assert fm.load_model(tmp_path / "b").config == model.config
    read = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        torch.testing.assert_close(read(TOKENS).logits, want)


def test_published_configs_with_images():
    """As gemma-3-4b-it and 27b-it have them; what else stands there is refused."""
    outer = {"model_type": "gemma3", **IMAGES, "initializer_range": 0.02}
    rope = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    small = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    text = small | rope | {"num_hidden_layers": 34}
    cfg = gemma3.Config.from_hf({**outer, "text_config": text})
    whole, images = 4_300_079_472, 416_866_032 + 1152 * 2560 + 1152  # tower, projector, its norm
    assert gemma3.model(cfg).num_parameters == whole - images
    text = rows()["gemma3"].published["gemma-3-27b-it, text_config"].config
    assert gemma3.Config.from_hf({**outer, "text_config": text}) == gemma3.Config.from_hf(text)
    with pytest.raises(ConfigError, match="hidden_twist=2"):
        gemma3.Config.from_hf({**outer, "text_config": text, "hidden_twist": 2})
    with pytest.raises(ConfigError, match="hidden_twist=2"):
        gemma3.Config.from_hf({**outer, "text_config": {**text, "hidden_twist": 2}})


def test_an_architecture_that_the_zoo_lacks_is_refused_with_what_is_near(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Gemma4ForCausalLM"]}))
    with pytest.raises(ConfigError) as caught:
        fm.load_model(tmp_path)
    need = caught.value.lines["need"]
    assert need.startswith("one of ")
    assert "as Gemma3ForCausalLM, Gemma2ForCausalLM, " in need
    assert len(need) < 120
