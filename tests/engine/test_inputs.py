"""Prompts as embeddings: rows of the table, in the place of tokens, give the same answers."""

import pytest

from tests.engine.custom import custom
from tests.engine.harness import generate, make_llm, run_in_engine
from tests.engine.odd import model as odd
from tests.engine.tiny import PROMPTS, check, expected, register, saved, tiny_llama

MODELS = {
    "llama": tiny_llama,
    "learned-positions": lambda: custom(positions="learned"),
    "scaled": lambda: odd,  # the embedding is multiplied in the model, as it is for tokens
}


RUNS = [*((kind, tp, False) for kind in MODELS for tp in (1, 2)), ("scaled", 1, "trace")]


@pytest.mark.parametrize(("kind", "tp", "compiled"), RUNS)
def test_embeddings_equal_tokens(kind, tp, compiled, tmp_path):
    """In one batch with tokens, and continued by tokens."""
    model = MODELS[kind]()
    weights = saved(model, tmp_path)

    def run():
        register(model)
        llm = make_llm(tmp_path, tp=tp, compiled=compiled, enable_prompt_embeds=True)
        embedded = [{"prompt_embeds": weights["embed"][p]} for p in PROMPTS]
        return generate(llm, [*embedded, *PROMPTS])

    want = expected(model, weights)
    check(run_in_engine(run, compiled=compiled), [*want, *want])
