"""A checkpoint whose names lack their beginning, as published ones of GPT-2 do."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import funcmodels as fm
from tests.engine.tiny import check, expected, serve_model
from tests.models.zoo import rows


def without_prefix(folder, model):
    """The folder's names as GPT-2's are published, masks included."""
    path = folder / "model.safetensors"
    tensors = {name.removeprefix(model.hf_prefix): t for name, t in load_file(path).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("variation", ["", "untied"])
def test_names_without_their_beginning(variation, tmp_path):
    row = rows()["gpt2"]
    model = row.model(variation)
    weights = row.weights(model)
    fm.save(model, weights, tmp_path)
    without_prefix(tmp_path, model)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    loaded = dict(fm.tree.items(fm.load(model, tmp_path)))
    for path, value in fm.tree.items(weights):
        assert torch.equal(loaded[path], value)
    check(serve_model(model, tmp_path, tp=2), expected(model, weights))
