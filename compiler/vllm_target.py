"""`compile_to_vllm`: a model -> the source of a vLLM class, and the class loaded from it."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from compiler.emit import emit_model
from compiler.ir import Program
from compiler.own_parameters import own_parameters
from compiler.partition import Partitioned, partition
from compiler.passes import passes
from compiler.passes.outline_layers import outline_layers
from compiler.passes.spell_products import spell_products
from compiler.passes.spell_unembedding import spell_unembedding
from compiler.strict import Strict, check_strict
from compiler.tokens_apart import check_tokens_apart
from compiler.trace import trace
from compiler.verify import verify
from funcmodels.atomic import write_file
from funcmodels.spec import POOLING_TASKS, Model

# Modules of emitted files: a class must be found again by its module's name to be compiled.
_PACKAGE = "funcmodels_served"
# What each class was compiled from, in this process.
_MODELS: dict[type, list[Model]] = {}


def lower_to_vllm(model: Model, *, strict: Strict = False) -> Partitioned:
    """The program of one tensor-parallel rank, in vLLM's layers.

    Raises:
        TraceError, LoweringError: with the user's line.
    """
    _, lowered = list(lowering(model, strict=strict))[-1]
    assert isinstance(lowered, Partitioned)
    check_strict(lowered, strict)
    return lowered


def lowering(model: Model, *, strict: Strict = False) -> Iterator[tuple[str, Program]]:
    """The program at each step from tracing to vLLM's layers, with the step's name."""
    program = trace(model)
    yield "trace", program
    spell = spell_products if model.task in POOLING_TASKS else spell_unembedding
    program = outline_layers(own_parameters(spell(program)))
    verify(program)
    check_tokens_apart(program)
    yield "outline_layers", program
    program = partition(program, "tp", strict=strict)
    yield "partition", program
    yield from passes(program)


def source_for_vllm(model: Model, *, strict: Strict = False) -> str:
    """The Python text of a model's vLLM class: a file that needs torch and vLLM only."""
    with uncollected():
        return emit_model(lower_to_vllm(model, strict=strict))


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: each would walk all of torch, 0.1 s, and find little."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def compile_to_vllm(model: Model, *, strict: Strict = False) -> type:
    """A model as a class that vLLM can register and serve at any tensor-parallel size.

    Args:
        model: the model.
        strict: refuse what is right but slow: values that are gathered, and products with
            parameters in plain torch; `fm.allow("a_function", "my_model.py:31")` but for these.
    Returns:
        A class, loaded from the emitted source; `cls.source` is that text, `cls.source_file` the
        file it was loaded from.
    Raises:
        TraceError: `forward` cannot be recorded.
        LoweringError: an operation cannot be served.
    """
    return load_model(model, strict=strict)


def load_model(model: Model, *, strict: Strict = False) -> Any:
    """The class of a model; this process remembers of which model it is."""
    cls: Any = load_source(source_for_vllm(model, strict=strict), model.name)
    others = [m for m in _MODELS.get(cls, []) if m.tensor_maps != model.tensor_maps]
    _MODELS[cls] = [*others, model]
    return cls


def model_of(cls: type) -> Model | None:
    """The model that this process compiled to a class, where there is exactly one.

    Models of one source can still differ in the paths of their parameters.
    """
    models = _MODELS.get(cls, [])
    return models[0] if len(models) == 1 else None


def emit(model: Model, path: str | os.PathLike[str], *, strict: Strict = False) -> Path:
    """Write a model's vLLM class to a file, which works where funcmodels is not installed."""
    path = Path(path)
    write_file(path, source_for_vllm(model, strict=strict).encode())
    return path


def load_source(source: str, name: str) -> type:
    """The class of an emitted source: equal sources give one class."""
    file = cache_file(source, name)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, source.encode())
    return load_file(file, name)


def load_file(file: Path, name: str) -> type:
    """The class `name` of an emitted file."""
    module_name = f"{_PACKAGE}.{file.stem}"
    if module_name not in sys.modules:
        sys.modules.setdefault(_PACKAGE, ModuleType(_PACKAGE))
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    cls: Any = getattr(sys.modules[module_name], name)
    cls.source = file.read_text()
    cls.source_file = str(file)
    return cls


def cache_file(source: str, name: str) -> Path:
    """Where an emitted source is kept: by content, in a folder of this user's alone."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return cache_folder() / f"{name}_{digest}.py"


def cache_folder() -> Path:
    """`$FUNCMODELS_CACHE/served`, below the user's cache folder unless the variable is set."""
    root = os.environ.get("FUNCMODELS_CACHE")
    base = Path(root) if root else _user_cache() / "funcmodels"
    return base / "served"


def _user_cache() -> Path:
    """The XDG cache folder; where there is no home, a private temporary one."""
    if "XDG_CACHE_HOME" in os.environ:
        return Path(os.environ["XDG_CACHE_HOME"])
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.mkdtemp(prefix="funcmodels-"))
