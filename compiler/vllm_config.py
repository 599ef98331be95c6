"""The config class of folders that `fm.save` wrote for a model made for no published checkpoint.

A module of its own: engine processes are handed the config pickled, and import its class by name.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from compiler.latent_cache import TYPES, has_latent


class FuncModelsConfig(PretrainedConfig):
    """Whatever fields config.json holds.

    The engine goes by the model_type alone whether it caches latents: one that speaks of them
    says that it is of the first such type. The engine asks for that type nowhere else.
    """

    model_type = "funcmodels"

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        if has_latent(fields):
            vars(self)["model_type"] = TYPES[0]
