"""Factories as users write them, in a module that worker processes import."""

import json
import os
from pathlib import Path
from typing import Any

import funcmodels as fm
from funcmodels.models import llama


def unquantised(hf_config: Any, parallel: fm.ParallelContext) -> fm.Model:
    """The Llama of a quantised folder: how weights are stored is the engine's affair."""
    return llama.model(llama.Config.from_hf(hf_config.to_dict()))


def other_theta(hf_config: Any, parallel: fm.ParallelContext) -> fm.Model:
    """The same Llama with other angles."""
    cfg = {**hf_config.to_dict(), "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    return llama.model(llama.Config.from_hf(cfg))


def recording(hf_config: Any, parallel: fm.ParallelContext) -> fm.Model:
    """Writes what it is told of the engine into the folder that RECORD names."""
    folder = Path(os.environ["RECORD"])
    seen = {name: getattr(parallel, name) for name in ("version", "tp_size", "tp_rank", "pp_size")}
    groups = {name: getattr(parallel, name) for name in ("tp_group", "pp_group")}
    seen |= {name: None if group is None else group.size() for name, group in groups.items()}
    (folder / f"rank{parallel.tp_rank}.json").write_text(json.dumps(seen))
    return llama.model(llama.Config.from_hf(hf_config.to_dict()))
