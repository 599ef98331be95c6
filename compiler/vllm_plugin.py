"""The `vllm.general_plugins` entry point: runs in every process that vLLM starts.

Registers the zoo, and what `fm.register` recorded in a parent process or persisted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from compiler.register import Entry, registered
from compiler.vllm_target import load_file
from funcmodels.models.registry import ZOO
from funcmodels.spec import Model


def register() -> None:
    """Register all models, once or often."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.logger import init_logger

    from compiler.vllm_config import FuncModelsConfig

    AutoConfig.register("funcmodels", FuncModelsConfig, exist_ok=True)
    known = ModelRegistry.get_supported_archs()
    for name in ZOO:
        if name not in known:  # neither in the place of vLLM's own class nor of a user's
            ModelRegistry.register_model(name, f"compiler.vllm_zoo:{name}")
    for name, entry in registered().items():
        try:
            register_entry(name, entry)
        except Exception as error:  # one broken entry must not keep others from being served
            init_logger(__name__).error("funcmodels cannot register %s: %s", name, error)


def register_entry(name: str, entry: Entry) -> None:
    """Register one model with vLLM in this process."""
    from vllm import ModelRegistry

    if "file" in entry:
        cls: type = load_file(Path(entry["file"]), entry["class"])
    else:
        if entry["path"] not in sys.path:
            sys.path.append(entry["path"])
        module, _, function = entry["factory"].partition(":")
        cls = factory_class(name, getattr(importlib.import_module(module), function))
    ModelRegistry.register_model(name, cls)


def factory_class(name: str, factory: Callable[..., Model]) -> type:
    """A class that asks a factory for the model when the engine builds it."""
    from compiler.vllm_factory import FactoryModel

    return type(name, (FactoryModel,), {"factory": staticmethod(factory)})
