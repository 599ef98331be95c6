"""What the engine tests serve: tiny models, their weights, and what the pure function answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import funcmodels as fm
from compiler.vllm_target import load_source
from funcmodels.models import llama
from tests.engine.harness import Served, serve

HF: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}

# Of several lengths; the longest is over several blocks of the KV cache, of 32 tokens here.
PROMPTS = [[1, 17, 200, 5, 9, 33, 7], [3], [250, *range(20, 110)]]
MAX_TOKENS = 8
TOLERANCE = 3e-5  # of log probabilities, float32

Expected = list[tuple[list[int], torch.Tensor]]


def tiny_llama(**changes: Any) -> fm.Model:
    """The Llama of `HF` with some fields changed."""
    return llama.model(llama.Config.from_hf({**HF, **changes}))


def weights_of(model: fm.Model, dtype: torch.dtype = torch.float32, scale: float = 1.3) -> Any:
    """Weights above the usual size; norms and biases differ from ones and zeros, and each other."""

    def shift(path: str, value: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, path)))
        noise = torch.randn(value.shape, generator=generator)
        is_drawn = bool((value != value.flatten()[0]).any())  # norms of heads are no matrices
        is_matrix = value.dim() > 1 and is_drawn
        return (scale * value if is_matrix else value + 0.3 * noise).to(dtype)

    return fm.tree.map_with_path(shift, fm.init(model, seed=0))


def saved(
    model: fm.Model, folder: Path, dtype: torch.dtype = torch.float32, scale: float = 1.3
) -> Any:
    """Write a folder of the model; returns the weights."""
    weights = weights_of(model, dtype, scale)
    fm.save(model, weights, folder)
    return weights


def expected(
    model: fm.Model,
    weights: Any,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    max_tokens: int = MAX_TOKENS,
) -> Expected:
    """Greedy tokens by the pure function, and log probabilities of all tokens but the first."""
    new = fm.generate(model, weights, prompts, max_new_tokens=max_tokens)
    full = [[*p, *n] for p, n in zip(prompts, new, strict=True)]
    logprobs = fm.logprobs(model, weights, full)
    spread = torch.cat(logprobs).std()
    assert spread > 0.5, f"log probabilities that hardly differ compare nothing: {spread}"
    return list(zip(new, logprobs, strict=True))


def distance(served: Sequence[Served], want: Expected) -> float:
    """The largest difference of log probabilities, infinite where greedy tokens differ."""
    worst = 0.0
    for answer, (tokens, logprobs) in zip(served, want, strict=True):
        if answer.tokens != tokens:
            return float("inf")
        got = torch.tensor(answer.all_logprobs)
        worst = max(worst, (got - logprobs[-len(got) :]).abs().max().item())
    return worst


def check(served: Sequence[Served], want: Expected, tolerance: float = TOLERANCE) -> None:
    """Greedy tokens equal, log probabilities within the tolerance."""
    for answer, (tokens, logprobs) in zip(served, want, strict=True):
        assert answer.tokens == tokens
        got = torch.tensor(answer.all_logprobs)
        torch.testing.assert_close(got, logprobs[-len(got) :], rtol=0, atol=tolerance)


def register(model: fm.Model, edit: Callable[[str], str] | None = None) -> type:
    """Register the class of a model; only inside `run_in_engine`.

    Args:
        edit: applied to the emitted source, to plant a fault.
    """
    from vllm import ModelRegistry

    from compiler import vllm_plugin

    cls: Any = fm.compile_to_vllm(model)
    if edit is not None:
        edited = edit(cls.source)
        assert edited != cls.source, "the fault was not planted"
        cls = load_source(edited, model.name)
    vllm_plugin.register()
    ModelRegistry.register_model(model.name, cls)
    return cls


def serve_model(
    model: fm.Model,
    folder: Path,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    edit: Callable[[str], str] | None = None,
    prompt_logprobs: bool = True,
    **kwargs: Any,
) -> list[Served]:
    """Answers of the emitted class, which is compiled and registered in the engine's own process.

    Args:
        edit: see `register`.
        kwargs: see `serve`.
    """
    return serve(
        folder,
        prompts,
        register=lambda: register(model, edit),
        prompt_logprobs=prompt_logprobs,
        **kwargs,
    )
