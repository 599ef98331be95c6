"""A side of the serving benchmark: a process that holds an engine and answers with seconds."""

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.engine import start

OURS, TRANSFORMERS = "ours", "transformers backend"  # the third side is named by vLLM's class
START_TIMEOUT = 900.0
IDLE = 1.5  # seconds after which the workers of vLLM's idle engines stop spinning


@dataclass(frozen=True)
class Load:
    """`batch` random prompts of `prompt` tokens, with `new` tokens generated for each."""

    what: str
    batch: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """What is counted: the prompts' tokens in a prefill load, else the new ones."""
        return self.batch * (self.prompt if self.new == 1 else self.new)


@dataclass(frozen=True)
class Settings:
    """What all sides have in common.

    Args:
        processor_time: count the processor's seconds, and not those of the clock on the wall.
    """

    folder: Path
    compiled: bool
    tp: int = 1
    threads: int | None = None
    processor_time: bool = False


def register_ours(folder: Path) -> str:
    """Compile the model and register it with vLLM; returns its architecture name."""
    import funcmodels as fm

    return fm.register(fm.load_model(folder), name="FuncmodelsBenchmark")


def start_engine(side: str, settings: Settings) -> Callable[[Load, int], float]:
    """Start an engine; returns a function that runs a load and gives its seconds."""
    from vllm import SamplingParams

    changes: dict[str, Any] = {
        "enforce_eager": not settings.compiled,
        "tensor_parallel_size": settings.tp,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
    }
    if side == OURS:
        changes["hf_overrides"] = {"architectures": [register_ours(settings.folder)]}
    elif side == TRANSFORMERS:
        changes["model_impl"] = "transformers"
    llm = start(settings.folder, **changes)
    vocab = llm.llm_engine.model_config.get_vocab_size()
    clock = time.process_time if settings.processor_time else time.perf_counter

    def run(load: Load, seed: int) -> float:
        rng = random.Random(seed)  # the same tokens on every side
        prompts: Any = [
            {"prompt_token_ids": [rng.randrange(100, vocab) for _ in range(load.prompt)]}
            for _ in range(load.batch)
        ]
        params = SamplingParams(
            temperature=0, max_tokens=load.new, ignore_eos=True, detokenize=False
        )
        start = clock()
        llm.generate(prompts, params, use_tqdm=False)
        return clock() - start

    return run


def _main(pipe: Connection, side: str, settings: Settings, log: Path) -> None:
    """Answer each (load, seed) with seconds, until None."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run = start_engine(side, settings)
    if settings.threads is not None and settings.tp == 1:
        import torch

        assert torch.get_num_threads() == settings.threads, "OMP_NUM_THREADS was not taken"
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        pipe.send(run(*request))


class Side:
    """A process that holds an engine."""

    def __init__(self, name: str, settings: Settings, log_dir: Path):
        self.name, self.tp = name, settings.tp
        self.log = log_dir / f"{name.replace(' ', '-')}.log"
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        args = (theirs, name, settings, self.log)
        self.process = context.Process(target=_main, args=args, daemon=False)
        self.process.start()
        theirs.close()
        if self._answer(START_TIMEOUT) != "ready":
            raise RuntimeError(f"{name}: unexpected answer")

    def _answer(self, timeout: float):
        try:
            if self.pipe.poll(timeout):
                return self.pipe.recv()
            reason = f"gave no answer in {timeout:.0f} s"
        except EOFError:
            reason = "ended"
        self.process.kill()
        tail = self.log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"the engine of {self.name!r} {reason}\n{tail}")

    def measure(self, load: Load, seed: int) -> float:
        """Tokens per second."""
        if self.tp > 1:
            time.sleep(IDLE)  # the workers of the side before are to be still
        self.pipe.send((load, seed))
        return load.tokens / self._answer(600.0)

    def close(self) -> None:
        try:
            self.pipe.send(None)
            self.process.join(60)  # vLLM takes its time to end
        except OSError:  # it has gone already
            pass
        finally:
            self.process.kill()
            self.process.join()
