"""Run the real vLLM engine in a test in about half a second, instead of 46.

    def test_served():
        [out] = serve(folder, [[1, 2, 3]], tp=2, prompt_logprobs=True)
        assert out.tokens == expected

A normal start imports for 12 s, spends 20 s in `LLM()` and 7 s on leaving. Here the imports
happen once in the test process, and each engine runs in a forked child of it. Why each trick:

- fork, not spawn: the child starts with every module imported. It may use closures and classes of
  the test, and can leave no state behind: vLLM caches model classes by name, parallel groups and
  environment variables for the life of a process.
- one thread before the fork: GNU OpenMP's pool does not survive a fork, and the first parallel
  region in the child would hang. `conftest.py` sets it before any test runs.
- the fork context for tensor-parallel workers: vLLM forces spawn on CPU, which would import
  everything again in each worker. Spawning is tested for itself, in the tests of registration.
- `VLLM_ENABLE_V1_MULTIPROCESSING=0`: the engine core in the child itself, and at tp=1 the worker.
- `gc.freeze()`: the engine calls `gc.collect` several times while it starts, and each would walk
  the million inherited objects, and copy their pages.
- `torch.compiler.set_stance("force_eager")` in eager tests: the engine compiles small helpers of
  its own even then. In compiled ones these are traced alone: with Inductor, one of the sampler's
  takes as long in each worker as tracing the model.
- kernels for the missing Triton bound before the fork: vLLM searches all modules for them. Nor
  does it set the levels of a thousand loggers again, in the child and in each worker.
- `kv_cache_memory_bytes`: otherwise the engine takes most of the machine's memory, and warms up.
- `nobind`: pinning threads needs a NUMA node per worker.
- a killed process group at the end, by the child itself once it has answered: no teardown, which
  takes each worker a second of collecting garbage, and no orphans, also after a timeout. What
  workers leave in shared memory is removed by its name.

`compiled=True` compiles with Inductor as in production. `compiled="trace"` stops after Dynamo: it
checks in 2 to 5 s that a class can be compiled, and runs what was traced eagerly.
"""

import contextlib
import fcntl
import functools
import gc
import importlib
import itertools
import logging
import os
import pickle
import re
import secrets
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO, TypeVar

import torch
import torch.nn.functional as F

# What we and the engine import on the way to the first token, and Dynamo while it traces.
PRELOAD = (
    "compiler.check",
    "compiler.explain",
    "compiler.register",
    "compiler.vllm_config",
    "compiler.vllm_plugin",
    "einops._torch_specific",
    "numpy.ctypeslib",
    "setproctitle",
    "torch._dynamo",
    "torch._inductor.config",
    "torch.distributed.tensor.experimental._attention",
    "sympy.physics.units",
    "transformers",
    "vllm",
    "vllm.compilation.backends",
    "vllm.distributed.device_communicators.cpu_communicator",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.llm",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.model_loader.dummy_loader",
    "vllm.model_executor.models.llama",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.pool.flash_maxsim",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
)

CHILD_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # otherwise it looks for an outward route
    "VLLM_USE_AOT_COMPILE": "0",  # 5 s instead of 23 s once Inductor's own cache is warm
    "VLLM_PLUGINS": "",  # tests register what they serve
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Mode = bool | Literal["trace"]
T = TypeVar("T")


class EngineError(AssertionError):
    """The child raised something that cannot be raised here, died, or ran out of time."""


@dataclass(frozen=True)
class Served:
    """What the engine answered to one prompt: greedy tokens, and their log probabilities."""

    tokens: list[int]
    logprobs: list[float]
    num_cached_tokens: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)  # of prompt[1:], when asked for
    top_logprobs: list[dict[int, float]] = field(default_factory=list)  # when num_logprobs > 1

    @property
    def all_logprobs(self) -> list[float]:
        return [*self.prompt_logprobs, *self.logprobs]


# --- the forked child ----------------------------------------------------------------------------


@functools.cache
def preload() -> None:
    """Import the engine into this process, once. About 10 s."""
    assert torch.get_num_threads() == 1, "a forked child hangs: torch.set_num_threads(1) first"
    with _environ(CHILD_ENV):  # some are read at import
        from vllm.platforms import current_platform

        current_platform.simple_compile_backend = "eager"  # read at import, for its helpers
        for name in PRELOAD:
            importlib.import_module(name)
        from vllm.config.logging import LoggingConfig
        from vllm.logger import configure_logging_if_needed

        configure_logging_if_needed(LoggingConfig())
    with warnings.catch_warnings():  # it looks at every attribute of every module
        warnings.simplefilter("ignore")
        current_platform.register_triton_kernel_overrides()
    torch.compile(F.silu, backend="eager", dynamic=True)(torch.ones(2, 2))  # Dynamo's own tables
    torch._dynamo.utils.counters.clear()


def run_in_engine(
    fn: Callable[..., T],
    *args: Any,
    compiled: Mode = False,
    env: Mapping[str, str] | None = None,
    timeout: float = 240.0,
    **kwargs: Any,
) -> T:
    """Call `fn(*args, **kwargs)` in a forked child ready for the engine, and return its result.

    Args:
        fn: any callable, closures included. Its result travels by pickle: plain data and tensors.
        compiled: False runs eagerly; True compiles; "trace" traces, and runs the trace eagerly.
        env: environment variables of the child, over `CHILD_ENV`.
        timeout: seconds, after which the child and its workers are killed. It may have to wait for
            an engine of another test process.
    Raises:
        What `fn` raised, with the child's traceback as a note, or EngineError with its output.
    """
    preload()
    # Never a name used before: ids of processes come again, and a file that a killed run left
    # would send the workers to addresses of the dead.
    name = f"vllm_harness_{secrets.token_hex(4)}"
    reader, writer = os.pipe()
    with tempfile.NamedTemporaryFile(prefix="engine-", suffix=".log") as log:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            call = functools.partial(fn, *args, **kwargs)
            _child(name, writer, log.fileno(), compiled, env or {}, call)
        os.close(writer)
        try:
            payload = _read_until(reader, time.monotonic() + timeout)
        finally:
            os.close(reader)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # workers too, and a child that ran out of time
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            for left_behind in Path("/dev/shm").glob(f"{name}-*"):
                left_behind.unlink(missing_ok=True)
            (Path(tempfile.gettempdir()) / name).unlink(missing_ok=True)
        output = _without_news(Path(log.name).read_text(errors="replace"))[-20_000:]
    if payload is None:
        raise EngineError(f"no answer from the engine within {timeout} s\n{output}")
    if not payload:
        end = os.waitstatus_to_exitcode(status)
        raise EngineError(f"the engine process died with status {end}\n{output}")
    ok, value, trace = pickle.loads(payload)
    if ok:
        return value
    if isinstance(value, BaseException):
        value.add_note(f"in the engine process:\n{trace}\n{output}")
        raise value
    raise EngineError(f"{value}\n{trace}\n{output}")


def _child(
    name: str,
    writer: int,
    log: int,
    compiled: Mode,
    env: Mapping[str, str],
    call: Callable[[], Any],
) -> NoReturn:
    """The whole life of the forked child; it never returns into the test runner."""
    status = 1
    try:
        os.setsid()  # one process group with the workers
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update({**CHILD_ENV, **env})
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
        if compiled == "trace":
            os.environ["VLLM_CPU_CI_ENV"] = "1"
        _prepare(name, compiled)
        try:
            answer = pickle.dumps((True, call(), ""))
        except BaseException as error:
            answer = _pickled_error(error)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        if status == 0:  # with the workers, who hold the pipe open, and would tidy up for a second
            os.killpg(0, signal.SIGKILL)
        os._exit(status)


def _prepare(name: str, compiled: Mode) -> None:
    """Undo, in the child, what the test process has set and the engine must not see.

    Args:
        name: what the files and the shared memory of this run are named after.
    """
    import multiprocessing
    from multiprocessing import shared_memory

    import torch._inductor.config as inductor
    import vllm.v1.executor.multiproc_executor as multiproc
    from vllm.platforms import current_platform

    gc.freeze()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for library in ("vllm", "transformers"):
        for handler in logging.getLogger(library).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
    multiproc.get_mp_context = lambda: multiprocessing.get_context("fork")
    multiproc.configure_logging = lambda config: None  # done, by preload()
    rendezvous = f"file://{tempfile.gettempdir()}/{name}"
    multiproc.get_file_store_init_method = lambda: rendezvous
    vars(shared_memory).update(  # so that what a killed run leaves can be found by name
        _SHM_NAME_PREFIX=f"/{name}-", _SHM_SAFE_NAME_LENGTH=40
    )
    current_platform.register_triton_kernel_overrides = lambda: None  # done, by preload()
    inductor.compile_threads = 1  # read at import, before vLLM asks for it
    if not compiled:
        torch.compiler.set_stance("force_eager")


def _without_news(output: str) -> str:
    """What a child printed, less the engine's news: there is a page of it before an error."""
    news = re.compile(r"\) (INFO|DEBUG) ")
    return "".join(line for line in output.splitlines(keepends=True) if not news.search(line))


def _pickled_error(error: BaseException) -> bytes:
    trace = "".join(traceback.format_exception(error))
    try:
        answer = pickle.dumps((False, error, trace))
        pickle.loads(answer)  # an exception with its own __init__ may pickle, and not unpickle
    except Exception:
        answer = pickle.dumps((False, f"{type(error).__name__}: {error}", trace))
    return answer


def _read_until(fd: int, deadline: float) -> bytes | None:
    """All bytes up to the end of the stream, or None when the deadline passes first."""
    chunks = []
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return None
        chunk = os.read(fd, 1 << 20)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


@contextlib.contextmanager
def _environ(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# --- inside the child ----------------------------------------------------------------------------

_fresh = itertools.count()
_cores: list[TextIO] = []  # the lock, held from the first engine on
_alive = []  # engines are never torn down: the child ends in os._exit


def _take_cores(ranks: int) -> None:
    """Wait until the other test processes leave room: an engine of several ranks runs alone.

    Ranks wait for each other by spinning, so two such engines on two cores take many times as long
    as one after the other. The lock goes with the child and its workers.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is not None:
        if not _cores:
            _cores.append((Path(tempfile.gettempdir()) / f"vllm_harness_cores_{run}").open("w"))
        fcntl.flock(_cores[0], fcntl.LOCK_EX if ranks > 1 else fcntl.LOCK_SH)


def make_llm(
    folder: str | Path,
    *,
    model_cls: type | str | None = None,
    arch: str | None = None,
    tp: int = 1,
    compiled: Mode = False,
    **llm_kwargs: Any,
) -> Any:
    """A small `vllm.LLM`. Only inside `run_in_engine`, with the same `compiled`.

    Args:
        folder: a HF folder; a config.json is enough with `load_format="dummy"`.
        model_cls: class, or "module:Class", to serve with. Default: what config.json names.
        arch: architecture to use or to register `model_cls` under. Default: a fresh name, since
            vLLM caches classes by name.
        tp: tensor parallel size.
        llm_kwargs: passed to `LLM`, over small defaults.
    """
    from vllm import LLM, ModelRegistry

    if model_cls is not None:
        arch = arch or f"HarnessModel{os.getpid()}n{next(_fresh)}"
        ModelRegistry.register_model(arch, model_cls)
    if arch is not None:
        overrides = dict(llm_kwargs.pop("hf_overrides", {}))
        llm_kwargs["hf_overrides"] = {**overrides, "architectures": [arch]}
    defaults = {
        "dtype": "float32",
        "enforce_eager": not compiled,
        "tensor_parallel_size": tp,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    if tp > 1:
        defaults["distributed_executor_backend"] = "mp"
    settings = {**defaults, **llm_kwargs}
    _take_cores(settings["tensor_parallel_size"] * settings.get("pipeline_parallel_size", 1))
    llm = LLM(model=str(folder), **settings)
    _alive.append(llm)
    return llm


def engine_model(llm: Any) -> torch.nn.Module:
    """The module that vLLM made. tp=1 only: with workers it lives in their processes."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.model_runner.model


def generate(
    llm: Any,
    prompts: Sequence[Sequence[int] | dict[str, Any]],
    *,
    max_tokens: int = 8,
    prompt_logprobs: bool = False,
    num_logprobs: int = 1,
    adapters: Sequence[Path | None] | None = None,
    **sampling: Any,
) -> list[Served]:
    """Greedy answers to prompts of token ids, all in one batch.

    Args:
        prompts: token ids, or what else vLLM takes, as {"prompt_embeds": ...}.
        adapters: the folder of each prompt's LoRA adapter, None for a prompt without.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=num_logprobs,
        prompt_logprobs=1 if prompt_logprobs else None,
        **sampling,
    )
    inputs = [p if isinstance(p, dict) else {"prompt_token_ids": list(p)} for p in prompts]
    loras = None
    if adapters is not None:
        number = {folder: i + 1 for i, folder in enumerate(dict.fromkeys(filter(None, adapters)))}
        loras = [LoRARequest(str(f), number[f], str(f)) if f else None for f in adapters]
    served = []
    for output in llm.generate(inputs, params, use_tqdm=False, lora_request=loras):
        [answer] = output.outputs
        tops = [{t: lp.logprob for t, lp in row.items()} for row in answer.logprobs]
        tokens = list(answer.token_ids)
        ids, rows = output.prompt_token_ids, output.prompt_logprobs
        served.append(
            Served(
                tokens=tokens,
                logprobs=[top[t] for t, top in zip(tokens, tops, strict=True)],
                num_cached_tokens=output.num_cached_tokens or 0,
                prompt_logprobs=(
                    [row[t].logprob for t, row in zip(ids[1:], rows[1:], strict=True)]
                    if prompt_logprobs
                    else []
                ),
                top_logprobs=tops if num_logprobs > 1 else [],
            )
        )
    return served


# --- both together -------------------------------------------------------------------------------


def serve(
    folder: str | Path,
    prompts: Sequence[Sequence[int]],
    *,
    model_cls: type | str | None = None,
    arch: str | None = None,
    register: Callable[[], Any] | None = None,
    warm_prompts: Sequence[Sequence[int]] = (),
    tp: int = 1,
    compiled: Mode = False,
    max_tokens: int = 8,
    prompt_logprobs: bool = False,
    num_logprobs: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    **llm_kwargs: Any,
) -> list[Served]:
    """Serve `prompts` (token ids) from `folder` in a forked engine.

    Args:
        folder, model_cls, arch, tp, llm_kwargs: see `make_llm`. Among `llm_kwargs`: `dtype`
            (float32), `enable_prefix_caching` (off), `max_num_batched_tokens` (small: chunked
            prefill; at least `max_num_seqs`), `load_format="dummy"`.
        register: called in the child before `LLM()`.
        warm_prompts: served first and forgotten, to fill the prefix cache.
        compiled, env, timeout: see `run_in_engine`.
        max_tokens, prompt_logprobs, num_logprobs: see `generate`.
    Note: a request for prompt logprobs never reads the prefix cache; compare `logprobs` there.
    """

    def run() -> list[Served]:
        if register is not None:
            register()
        llm = make_llm(
            folder, model_cls=model_cls, arch=arch, tp=tp, compiled=compiled, **llm_kwargs
        )
        if warm_prompts:
            generate(llm, warm_prompts, max_tokens=1)
        return generate(
            llm,
            prompts,
            max_tokens=max_tokens,
            prompt_logprobs=prompt_logprobs,
            num_logprobs=num_logprobs,
        )

    return run_in_engine(run, compiled=compiled, env=env, timeout=timeout)
