"""`fm.push_weights`: all weights of a running engine replaced by those of a trainer.

The engine's own `reload_weights` does the loading: fused, sharded and packed layers are made as
at its start. Tensors reach it one after another: as they are where its only worker lives in this
process, and else through safetensors files in shared memory, of which only the names are sent.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, ModelRegistry
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from compiler.parallel import ParallelContext
from compiler.vllm_factory import FactoryModel
from compiler.vllm_target import compile_to_vllm, model_of
from funcmodels import tree
from funcmodels.checkpoint import write_tensors
from funcmodels.checkpoint_check import check_weights
from funcmodels.errors import FuncModelsError
from funcmodels.parts import stored_tensors_of
from funcmodels.spec import Model

# Bytes of one file on its way: about as much is in memory beside the files.
_FILE_SIZE = 256 << 20


class PushError(FuncModelsError):
    """The weights of a running engine cannot be replaced."""


def push_weights(llm: LLM, weights: Any, *, model: Model | None = None) -> None:
    """Replace all weights of a running engine: every later token comes from the new ones.

    No restart, no disk, and nothing that was computed from the old weights is kept: the prefix
    cache is emptied. LoRA adapters are dropped by the engine and loaded again when asked for.

    Where the engine runs in processes of its own, the tensors travel through `/dev/shm`, which
    holds one copy of them meanwhile, whatever the number of workers. Where that has no room for
    them it is the folder for temporary files.

    Args:
        llm: a running `vllm.LLM` of a class that funcmodels emitted, at any parallel sizes.
        weights: pytree of floating-point tensors with the structure of `model.params`. They are
            cast to the engine's dtype, as at its start, and are not changed.
        model: the model that is served. None finds it by the engine's architecture, which is
            possible where `fm.register` or `fm.compile_to_vllm` ran in this process.
    Raises:
        CheckpointError: these are not the weights of the model. Nothing was sent.
        PushError: the engine cannot be updated, and serves what it served. Or the update failed
            half-way: then the error says so, and the engine was shut down, since it would go on
            with some of its weights old and some new.
    """
    _check_engine(llm)
    served = _served_class(llm)
    _check_layers(served, llm.llm_engine.model_config.dtype)
    model = _model_of(served, model)
    values = dict(tree.items(weights))
    check_weights(model, values)
    with contextlib.ExitStack() as stack:
        if _is_in_process(llm):
            tensors: Any = _tensors(model, values)
        else:
            tensors = stack.enter_context(_in_files(model, values))
        try:
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
            if not llm.reset_prefix_cache(reset_connector=True):
                raise RuntimeError("the prefix cache could not be emptied")
        except BaseException as error:
            llm.llm_engine.engine_core.shutdown()
            if not isinstance(error, Exception):
                raise
            raise PushError(
                "the update failed half-way, and the engine was shut down",
                got=f"{type(error).__name__}: {error}",
                need="all weights replaced, or none: an engine with some of them is of no use",
                fix="start a new engine: LLM(...)",
            ) from error


def _check_engine(llm: Any) -> None:
    """Refuse what cannot be updated, or would be updated wrongly."""
    if not isinstance(llm, LLM):
        raise PushError(
            "this is no engine whose weights can be replaced",
            got=type(llm).__name__,
            need="a vllm.LLM of this process",
            fix="llm = LLM(folder); fm.push_weights(llm, weights)",
        )
    config = llm.llm_engine.vllm_config
    if llm.llm_engine.has_unfinished_requests():
        raise PushError(
            "requests are in flight",
            got=f"{llm.llm_engine.get_num_unfinished_requests()} unfinished",
            need="none: their next tokens would come from keys and values of both weights",
            fix="llm.wait_for_completion(), or llm.llm_engine.abort_request(ids), and push then",
        )
    if method := config.model_config.quantization:
        raise PushError(
            "the engine's weights are quantised",
            got=f"quantization={method!r}",
            need="an engine that keeps weights as the model declares them",
            fix="quantise the new weights into a folder, and start an engine of it",
        )
    if config.lora_config is not None:
        raise PushError(
            "the engine's layers are wrapped for LoRA adapters",
            got="enable_lora=True",
            need="an engine without adapters: vLLM finds no place for weights below the wrappers",
            fix="LLM(...) without enable_lora",
        )
    parallel = config.parallel_config
    if parallel.nnodes > 1 or parallel.distributed_executor_backend == "ray":
        raise PushError(
            "the engine's workers may be on other machines",
            got=f"{parallel.nnodes} nodes, distributed_executor_backend="
            f"{parallel.distributed_executor_backend!r}",
            need="all workers on this machine, where they can read its shared memory",
            fix='distributed_executor_backend="mp" on one machine',
        )


def _served_class(llm: LLM) -> Any:
    """The emitted class that the engine serves, as this process knows it.

    Raises:
        PushError: it is not one of funcmodels, or cannot be told.
    """
    config = llm.llm_engine.model_config
    registered = ModelRegistry.models.get(config.architecture)
    cls: Any = registered.load_model_cls() if registered else None
    if isinstance(cls, type) and issubclass(cls, FactoryModel):
        return compile_to_vllm(cls.factory(config.hf_config, _ranks(llm)))
    if not hasattr(cls, "compiled_by"):
        raise PushError(
            f"{config.architecture} is served by a class that funcmodels did not emit",
            got=f"{cls.__module__}.{cls.__qualname__}" if cls else "a class of another process",
            need="a class whose tensors are known",
            fix="fm.register(model) before LLM(...)",
        )
    return cls


def _check_layers(served: Any, dtype: torch.dtype) -> None:
    """Refuse layers that vLLM does not reload whole.

    vLLM's own layer of experts is off by nats after it on a CPU, with the same weights too; that
    which emitted files carry is made anew. Of float16 sinks, attention on a CPU makes a float32
    copy at its first call, and never another.
    """
    module = sys.modules[served.__module__]
    if dtype == torch.float16 and "sinks=self." in Path(str(module.__file__)).read_text():
        raise PushError(
            f"{served.__name__} has attention sinks, of which vLLM keeps a copy in float32",
            got="an engine in float16",
            need="a dtype in which it reads the parameter itself",
            fix='LLM(..., dtype="bfloat16") or dtype="float32"',
        )
    used = vars(module).values()
    mixes = any("fused_moe" in str(getattr(each, "__module__", "")) for each in used)
    if mixes and not hasattr(module, "OwnRoutedExperts"):
        raise PushError(
            f"{served.__name__} mixes experts",
            got="vLLM's layer for them, whose weights are wrong after an update",
            need="a model without it, or compiled by this version",
            fix="fm.save(model, weights, folder), and start an engine of that folder",
        )


def _ranks(llm: LLM) -> ParallelContext:
    """What a factory is told here, where there are sizes but no ranks and no groups."""
    parallel = llm.llm_engine.vllm_config.parallel_config
    return ParallelContext(
        tp_size=parallel.tensor_parallel_size,
        pp_size=parallel.pipeline_parallel_size,
        dp_size=parallel.data_parallel_size,
    )


def _model_of(served: Any, model: Model | None) -> Model:
    """The model of a served class: the one it was compiled from, or the one that is given.

    Raises:
        PushError: it is not known here, or a given one is another.
    """
    own = model_of(served)
    if model is None:
        if own is None:
            raise PushError(
                f"the model that {served.__name__} was compiled from is not known here",
                got=f"a class of {sys.modules[served.__module__].__file__}",
                need="the model, which says what tensor each parameter is",
                fix="fm.push_weights(llm, weights, model=model)",
            )
        return own
    if model is not own:
        ours, theirs = (sys.modules[c.__module__] for c in (compile_to_vllm(model), served))
        for table in ("COMPILED_FOR", "TENSORS"):
            if getattr(ours, table) != getattr(theirs, table):
                raise PushError(
                    "the engine serves another model",
                    got=f"{model.name}, of another {table} than {theirs.__file__} has",
                    need=f"the model that {served.__name__} was compiled from",
                    fix="leave model= out, or pass the one that was registered",
                )
    return model


def _is_in_process(llm: LLM) -> bool:
    """Whether the engine's one worker is in this process, so that tensors need not travel."""
    client = llm.llm_engine.engine_core
    return isinstance(client, InprocClient) and isinstance(
        client.engine_core.model_executor, UniProcExecutor
    )


def _tensors(model: Model, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors, in the tree's order: a layer is loaded as soon as it is whole."""
    return stored_tensors_of(model.tensor_maps, values)


@contextlib.contextmanager
def _in_files(model: Model, values: Mapping[str, Tensor]) -> Iterator[list[tuple[str, str]]]:
    """The name of each tensor and of the file that holds it: what an engine process is sent.

    No pickle: names go as text, and tensors as safetensors, in a folder of this user's alone.
    """
    size = sum(value.numel() * value.element_size() for value in values.values())
    folder = Path(tempfile.mkdtemp(prefix="funcmodels-push-", dir=_roomy_folder(size)))
    try:
        files = write_tensors(model, values, folder, _FILE_SIZE)
        yield [(name, str(folder / file)) for name, file in files.items()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _roomy_folder(size: int) -> str | None:
    """Shared memory with room for so many bytes; None, the temporary folder, without."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > size + (16 << 20)
    return str(memory) if has_room else None
