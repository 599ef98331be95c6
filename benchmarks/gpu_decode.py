"""Greedy decoding with `compile_to_torch` in a CUDA graph, where there is no vLLM.

`compile_to_torch` has no key-value cache: every token costs a forward over the whole window. So the
peers are itself without a graph: what a graph saves is shown, and nothing about serving.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import funcmodels as fm
from benchmarks.gpu_time import BACKEND, BF16, DEVICE, graphed, turns
from benchmarks.gpu_train import BIG, SMALL
from benchmarks.table import Row, compare
from funcmodels.models import llama

WINDOW, PROMPT = 512, 128


def decoding(*, quick: bool, count: int) -> list[Row]:
    """Rows of tokens/s of one sequence."""
    size = SMALL if quick else BIG
    window, prompt = (32, 8) if quick else (WINDOW, PROMPT)
    model = llama.model(llama.Config.from_hf(size.hf))
    served = fm.compile_to_torch(model)
    served.load(
        fm.tree.map(lambda p: torch.randn(p.shape, device=DEVICE, dtype=BF16) * 0.02, model.params)
    )
    compiled = torch.compile(served, backend=BACKEND)
    sides = {
        name: _stepper(forward, window, prompt, size.hf["vocab_size"], graph)
        for name, forward, graph in (
            ("ours", compiled, True),
            ("eager", served, False),
            ("compiled, no graph", compiled, False),
        )
    }
    with torch.no_grad():
        times = turns(sides, count)
    speeds = {name: [1 / t for t in values] for name, values in times.items()}
    ours = speeds.pop("ours")
    return [compare(f"decode without a cache, window {window}", ours, speeds, "tokens/s")]


def _stepper(
    forward: Any, window: int, prompt: int, vocab: int, graph: bool
) -> Callable[[], Tensor]:
    """One more token, written into a buffer that stays where it is."""
    torch.manual_seed(0)
    tokens = torch.randint(0, vocab, (1, window), device=DEVICE)
    at = torch.full((), prompt, device=DEVICE)
    one = torch.ones((), dtype=torch.long, device=DEVICE)

    def step() -> Tensor:
        logits = forward(tokens)  # causal: what stands behind `at` changes nothing before it
        chosen = logits.index_select(1, at[None] - 1)[:, 0].argmax(-1)
        tokens.index_copy_(1, at[None], chosen[:, None])
        at.copy_(torch.where(at + one < window, at + one, prompt))
        return chosen

    with torch.no_grad():
        return graphed(step) if graph else step
