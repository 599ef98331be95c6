"""The zoo's models as classes that vLLM finds by name, each made when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from compiler.parallel import ParallelContext
from compiler.vllm_plugin import factory_class
from funcmodels.models.registry import ZOO
from funcmodels.spec import Model


def __getattr__(name: str) -> Any:
    if name not in ZOO:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    zoo = importlib.import_module(ZOO[name])

    def factory(hf_config: Any, parallel: ParallelContext) -> Model:
        return zoo.model(zoo.Config.from_hf(hf_config.to_dict()))

    cls = factory_class(name, factory)
    cls.__module__ = __name__
    globals()[name] = cls
    return cls
