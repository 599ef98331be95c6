"""Plain generation against `transformers`, and the sampling against closed forms."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers

import funcmodels as fm
from funcmodels.errors import ShapeError
from tests.tiny_llama import HF, state_dict, tiny, weights_of

torch.set_num_threads(1)

PROMPTS = [[5, 17, 3], [88], [1, 2, 3, 4, 5, 6, 7]]


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def weights(model):
    return weights_of(model)


@pytest.fixture(scope="module")
def peer(model, weights):
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**HF, eos_token_id=None))
    module.load_state_dict(state_dict(model, weights))
    return module


def test_greedy_equals_transformers(model, weights, peer):
    ours = fm.generate(model, weights, PROMPTS, max_new_tokens=8)
    for prompt, new in zip(PROMPTS, ours, strict=True):
        theirs = peer.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        assert theirs[0, len(prompt) :].tolist() == new


def test_logprobs_equal_transformers(model, weights, peer):
    ours = fm.logprobs(model, weights, PROMPTS)
    for prompt, got in zip(PROMPTS, ours, strict=True):
        logits = peer(torch.tensor([prompt])).logits[0, :-1]
        want = logits.log_softmax(-1)[
            torch.arange(len(prompt) - 1), torch.tensor(prompt[1:]).long()
        ]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_prompt_does_not_depend_on_its_neighbours(model, weights):
    together = fm.generate(model, weights, PROMPTS, max_new_tokens=6, temperature=1.0, seed=3)
    first = fm.generate(model, weights, PROMPTS[0], max_new_tokens=6, temperature=1.0, seed=3)
    assert together[0] == first


@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "tensor"])
def test_one_prompt_or_several(model, weights, kind):
    one = fm.generate(model, weights, kind([5, 17, 3]), max_new_tokens=4)
    several = fm.generate(model, weights, kind([[5, 17, 3], [5, 17, 3]]), max_new_tokens=4)
    assert several == [one, one]
    assert fm.logprobs(model, weights, kind([5, 17, 3])).shape == (2,)


def test_eos_is_the_last_token(model, weights):
    full = fm.generate(model, weights, PROMPTS, max_new_tokens=8)
    end = full[0][3]
    stopped = fm.generate(model, weights, PROMPTS, max_new_tokens=8, eos=end)
    for whole, cut in zip(full, stopped, strict=True):
        assert cut == (whole[: whole.index(end) + 1] if end in whole else whole)
    assert fm.generate(model, weights, PROMPTS, max_new_tokens=8, eos=[end, 96]) is not None


def test_empty_prompt(model, weights):
    with pytest.raises(ShapeError, match="prompt 1 is empty"):
        fm.generate(model, weights, [[1], []], max_new_tokens=1)


# A model whose next token does not depend on the prompt, with known probabilities.

PROBS = torch.tensor([0.5, 0.25, 0.15, 0.1])


def fixed() -> fm.Model:
    def forward(params, tokens, positions, segment_ids=None):
        return params["logits"].expand(*tokens.shape, 4)

    return fm.Model("Fixed", None, {"logits": fm.axes(vocab=4)("vocab")}, forward)


def shares(**how) -> list[float]:
    prompts = [[0]] * 1500
    weights = {"logits": PROBS.log()}
    new = fm.generate(fixed(), weights, prompts, max_new_tokens=1, seed=0, **how)
    counts = Counter(token for (token,) in new)
    return [counts[i] / len(prompts) for i in range(4)]


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 1.0}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        ({"temperature": 1.0, "top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.1}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),
    ],
    ids=str,
)
def test_sampling_follows_the_probabilities(how, want):
    assert shares(**how) == pytest.approx(want, abs=0.04)
