"""The decoder alone of a model that generates text, as checkpoints of embedding models hold it."""

from __future__ import annotations

import dataclasses
from typing import Any

import funcmodels as fm


def without_logits(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters but those of the logits; the checkpoint has no "model." before their names."""
    return fm.tree.map(
        lambda p: dataclasses.replace(p, hf=p.hf.removeprefix("model.")),
        {key: p for key, p in params.items() if key != "head"},
    )
