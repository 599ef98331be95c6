"""The config class of folders that `fm.save` wrote for a model made for no published checkpoint.

A module of its own: engine processes are handed the config pickled, and import its class by name.
"""

from __future__ import annotations

from transformers import PretrainedConfig


class FuncModelsConfig(PretrainedConfig):
    """Whatever fields config.json holds."""

    model_type = "funcmodels"
