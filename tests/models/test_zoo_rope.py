"""Every rope scaling that a row's Config reads, and that no variation of the row has yet."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import funcmodels as fm
from funcmodels.errors import ConfigError
from tests.models.test_zoo import LENGTH, peer_of, tokens_of
from tests.models.zoo import Row, rows

torch.set_num_threads(1)

SHORT = 16  # below LENGTH: what depends on the length sees prompts beyond it
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": SHORT,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SHORT},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": SHORT},
}


def own_fields(row: Row) -> set[str]:
    """The names that the row's Config declares."""
    return {field.name for field in dataclasses.fields(row.zoo.Config)}


def rope_fields(row: Row, kind: str) -> dict[str, Any]:
    """Of config.json: a scaling, of which longrope has two factors for each rotated pair."""
    rope = {"rope_type": kind, **KINDS[kind]}
    fields = {"rope_scaling": rope, "max_position_embeddings": SHORT}
    cfg = row.zoo.Config.from_hf(row.hf)
    if kind == "longrope":
        whole = cfg.head_dim if hasattr(cfg, "head_dim") else cfg.qk_rope_head_dim
        pairs = int(whole * getattr(cfg, "partial_rotary_factor", 1)) // 2
        rope["short_factor"] = [1 + i / pairs for i in range(pairs)]
        rope["long_factor"] = [1 + 4 * i / pairs for i in range(pairs)]
    if "head_dim" in own_fields(row):
        fields["head_dim"] = cfg.head_dim  # transformers' Mixtral does not find it out here
    if "position_embedding_type" in own_fields(row):
        fields["position_embedding_type"] = "rope"
    return fields


def is_read(row: Row, kind: str) -> bool:
    """Whether the Config reads it; a refusal of anything but the type is an error of this test."""
    if "rope_scaling" not in own_fields(row):
        return False
    try:
        row.zoo.Config.from_hf(row.fields(**rope_fields(row, kind)))
    except ConfigError as error:
        if "does not support this rope_type" not in str(error):
            raise
        return False
    return True


def is_varied(row: Row, kind: str) -> bool:
    """Whether the row or a variation has it: then it is compared with its gradients."""
    configs = [row.zoo.Config.from_hf(row.fields(v)) for v in ("", *row.variations)]
    return any(dict(cfg.rope_scaling or ()).get("rope_type") == kind for cfg in configs)


# Classifiers and embeddings take the hidden states of a row that generates.
GENERATING = {name: row for name, row in rows().items() if row.model().task == "generate"}
CASES = [(name, kind) for name, row in GENERATING.items() for kind in KINDS
         if is_read(row, kind) and not is_varied(row, kind)]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_logits_equal_transformers(name, kind, tmp_path):
    """Beyond the length of pretraining; without the scaling they are others."""
    row = rows()[name]
    fields = rope_fields(row, kind)
    model = row.model(**fields)
    weights = row.weights(model)
    fm.save(model, weights, tmp_path)
    tokens = tokens_of(row)
    positions = torch.arange(LENGTH).expand(tokens.shape)
    logits = model.forward(weights, tokens, positions)
    peers = peer_of(row, tmp_path, torch.float32)(tokens).logits
    torch.testing.assert_close(logits, peers, rtol=1e-4, atol=3e-5)
    plain = row.model(**fields | {"rope_scaling": {"rope_type": "default"}})
    unscaled = plain.forward(weights, tokens, positions)
    assert (unscaled - peers).abs().max() > 0.03, "the scaling changes nothing here"


def test_no_kind_is_left_out():
    """Each is read by several rows, so that nothing here passes because there is nothing."""
    for kind in KINDS:
        assert sum(of == kind for _, of in CASES) > 10, kind
