"""`fm.register`: a model's name, known to vLLM in this process and in every one it starts.

vLLM starts engine and worker processes by spawning, and each runs the `vllm.general_plugins` entry
point `compiler.vllm_plugin:register`. What is registered is passed on to them as data: for a model
the emitted file, which needs nothing of the user's; for a factory its importable name.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from compiler.strict import Strict
from compiler.vllm_target import cache_folder, load_model
from funcmodels.atomic import write_file
from funcmodels.errors import FuncModelsError
from funcmodels.spec import Model

# name -> entry, as JSON. Child processes inherit it; it holds file names only.
VARIABLE = "FUNCMODELS_REGISTERED"

Entry = dict[str, str]


class RegisterError(FuncModelsError):
    """A model or a factory cannot be made known to other processes."""


def register(
    model_or_factory: Model | Callable[..., Model],
    *,
    name: str | None = None,
    persist: bool = False,
    strict: Strict = False,
) -> str:
    """Make `LLM(folder)` and `vllm serve folder` find a model, at any parallel sizes.

    Args:
        model_or_factory: a model; or `factory(hf_config, parallel) -> Model`, called in every
            worker of the live engine (see `fm.ParallelContext`), from an importable module.
        name: the architecture's name in config.json; a model's own by default.
        persist: also for processes that this one does not start, as a `vllm serve` on the command
            line: kept in the user's cache folder.
        strict: as in `compile_to_vllm`.
    Returns:
        The name.
    Raises:
        RegisterError: a factory that other processes cannot import, or without a name.
        TraceError, LoweringError: as `compile_to_vllm`.
    """
    if isinstance(model_or_factory, Model):
        name = name or model_or_factory.name
        cls = load_model(model_or_factory, strict=strict)
        entry = {"file": cls.source_file, "class": model_or_factory.name}
    else:
        if name is None:
            raise RegisterError(
                "a factory is registered without a name",
                need="the architecture's name in config.json",
                fix='fm.register(factory, name="MyModelForCausalLM")',
            )
        entry = _factory_entry(model_or_factory)
    _remember(name, entry)
    if persist:
        _persist(name, entry)
    from compiler import vllm_plugin  # imports vLLM

    vllm_plugin.register_entry(name, entry)
    return name


def _factory_entry(factory: Callable[..., Model]) -> Entry:
    """How other processes import a factory.

    Raises:
        RegisterError: they cannot.
    """
    module, function = getattr(factory, "__module__", ""), getattr(factory, "__qualname__", "")
    found = getattr(sys.modules.get(module), function, None)
    if found is not factory or module == "__main__":
        raise RegisterError(
            f"other processes cannot import the factory {function or factory!r}",
            got=f"defined in {'the main script' if module == '__main__' else module or '?'}",
            need="a function at the top level of a module: workers import it by name",
            fix="move it to a file of its own, my_factory.py, and import it from there",
        )
    file = getattr(sys.modules[module], "__file__", None)
    root = Path(file).resolve().parents[module.count(".")] if file else Path()
    if file and Path(file).name == "__init__.py":
        root = root.parent
    return {"factory": f"{module}:{function}", "path": str(root)}


def registered() -> dict[str, Entry]:
    """Everything that this process is told to register: persisted, then inherited."""
    found: dict[str, Entry] = {}
    if _file().exists():
        found.update(json.loads(_file().read_text()))
    found.update(json.loads(os.environ.get(VARIABLE, "{}")))
    return found


def _remember(name: str, entry: Entry) -> None:
    """For the processes that this one starts."""
    entries = json.loads(os.environ.get(VARIABLE, "{}"))
    os.environ[VARIABLE] = json.dumps({**entries, name: entry})


def _persist(name: str, entry: Entry) -> None:
    """For every process of this user."""
    entries = json.loads(_file().read_text()) if _file().exists() else {}
    _file().parent.mkdir(parents=True, exist_ok=True)
    write_file(_file(), json.dumps({**entries, name: entry}, indent=2).encode())


def _file() -> Path:
    return cache_folder() / "registered.json"
