"""Other spellings of a field that configs have had, and numbers that no model has."""

from __future__ import annotations

import pytest
import torch
import transformers

import funcmodels as fm
from funcmodels.errors import ConfigError
from tests.models.zoo import rows

torch.set_num_threads(1)


@pytest.mark.parametrize("old", ["su", "yarn"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_names_that_phi_3_gave_its_scaling(key, old, tmp_path):
    """It is longrope, and transformers reads it from what is written."""
    row = rows()["phi3"]
    fields = row.fields("longrope-long")
    rope = {k: v for k, v in fields["rope_scaling"].items() if k not in ("type", "rope_type")}
    model = row.zoo.model(row.zoo.Config.from_hf({**fields, "rope_scaling": {**rope, key: old}}))
    assert model.config == row.zoo.Config.from_hf(fields)
    fm.save(model, row.weights(model), tmp_path)
    told = transformers.Phi3Config.from_pretrained(tmp_path).to_dict()
    assert told["rope_parameters"]["rope_type"] == "longrope"
    assert row.zoo.Config.from_hf(told) == model.config


NEIGHBOURS = {"rope_interleaved": True}


def test_cohere_turns_neighbours():
    row = rows()["cohere"]
    assert row.zoo.Config.from_hf({**row.hf, **NEIGHBOURS}) == row.zoo.Config.from_hf(row.hf)
    with pytest.raises(ConfigError, match=r"this rope_interleaved\n +got: +rope_interleaved=False"):
        row.zoo.Config.from_hf({**row.hf, "rope_interleaved": False})


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
MIXTURES = {name: key for name, row in rows().items() for key in EXPERTS if key in row.hf}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("taken", [0, 1, 99])
@pytest.mark.parametrize("experts", [0, 8])
def test_numbers_of_experts_that_no_model_has(name, experts, taken):
    """None at all, but in Granite's dense models; none a token; more a token than there are."""
    row, key = rows()[name], MIXTURES[name]
    fields = row.fields(**{key: experts, "num_experts_per_tok": taken})
    if (taken == 1 and experts) or (name == "granite_moe_hybrid" and not experts):
        assert row.zoo.Config.from_hf(fields).num_experts_per_tok == taken
        return
    with pytest.raises(ConfigError, match=rf"{key}={experts}, num_experts_per_tok={taken}"):
        row.zoo.Config.from_hf(fields)
