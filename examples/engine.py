"""vLLM as the examples use it: quiet, ended when its block ends, asked in token ids."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "enforce_eager": True,  # starts in seconds; compiled serving is faster and takes a minute more
    "max_model_len": 512,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 128 << 20,
    "disable_log_stats": True,
}


@dataclass(frozen=True)
class Answer:
    """What an engine said to one prompt, and the log-probability of every token but the first."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@contextlib.contextmanager
def engine(folder: str | Path, *, log: Path, **settings: Any) -> Iterator[Any]:
    """A `vllm.LLM`, with its processes ended afterwards; what they print goes to the log."""
    with quiet(log):
        from vllm import LLM

        llm = LLM(str(folder), **{**SETTINGS, **settings})
    try:
        yield llm
    finally:
        with quiet(log):
            llm.llm_engine.engine_core.shutdown(timeout=60)


def ask(llm: Any, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[Answer]:
    """Greedy answers to prompts of token ids, in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=0, prompt_logprobs=0, detokenize=False
    )
    answers = []
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    for output in llm.generate(inputs, params, use_tqdm=False):
        prompt, new = output.prompt_token_ids, output.outputs[0]
        rows = [*output.prompt_logprobs[1:], *new.logprobs]
        chosen = [*prompt[1:], *new.token_ids]
        logprobs = [row[token].logprob for token, row in zip(chosen, rows, strict=True)]
        answers.append(Answer(list(prompt), list(new.token_ids), logprobs))
    return answers


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send what this process and the ones it starts print to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for fd in (*kept, file):
            os.close(fd)
