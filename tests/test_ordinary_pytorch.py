"""The module of `fm.compile_to_torch(model)` in the hands of what trains any `nn.Module`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import funcmodels as fm
from tests.optim.test_against_torch import assert_same
from tests.test_training_checkpoint import join, on_ranks
from tests.tiny_llama import tiny

torch.set_num_threads(1)

MODEL = tiny(vocab_size=16, num_hidden_layers=2)
STEPS = 6


def batch(number: int) -> Tensor:
    """Tokens (4, 10)."""
    return torch.randint(0, 16, (4, 10), generator=torch.Generator().manual_seed(number))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(module: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0) -> list[float]:
    losses = []
    for number in range(first, first + STEPS):
        loss = loss_of(module(batch(number)), batch(number))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.02, fused=True)


def pure(optimizer: fm.optim.Optimizer) -> Any:
    """What the pure function and a functional optimiser make of the same steps."""

    def loss(weights: Any, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        return loss_of(MODEL.forward(weights, tokens, positions), tokens)

    weights = fm.init(MODEL, seed=0)
    state, losses = optimizer.init(weights), []
    for number in range(STEPS):
        grads, value = torch.func.grad_and_value(loss)(weights, batch(number))
        weights, state = optimizer.update(grads, state, weights)
        losses.append(float(value))
    return weights, losses


def values(module: Any) -> Any:
    return fm.tree.map(Tensor.detach, module.weights())


def test_torch_optim():
    module = fm.compile_to_torch(MODEL).reset(seed=0)
    losses = train(module, adamw(module))
    weights, expected = pure(fm.optim.adamw(0.02))
    assert losses == pytest.approx(expected, rel=1e-6)
    fm.tree.map(torch.testing.assert_close, values(module), weights)


def test_frozen_as_peft_does():
    """By `requires_grad`: only what is trained has a gradient, and the rest keeps its bits."""
    module = fm.compile_to_torch(MODEL).reset(seed=0)
    module.requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(".attn." in name)
    losses = train(module, adamw(module))
    frozen = {"layers.*.attn.*": fm.optim.adamw(0.02), "*": fm.optim.frozen()}
    weights, expected = pure(fm.optim.partition(frozen))
    assert losses == pytest.approx(expected, rel=1e-6)
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
    start = dict(fm.tree.items(fm.init(MODEL, seed=0)))
    for path, value in fm.tree.items(values(module)):
        assert torch.equal(value, start[path]) is (".attn." not in path)
    fm.tree.map(torch.testing.assert_close, values(module), weights)


def test_torch_distributed_checkpoint(tmp_path):
    """Saved half-way and loaded into new objects, it goes on as if nothing had been."""
    module = fm.compile_to_torch(MODEL).reset(seed=0)
    optimizer = adamw(module)
    train(module, optimizer)
    parts = dict(zip(("module", "optimizer"), get_state_dict(module, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=tmp_path)
    again = fm.compile_to_torch(MODEL).reset(seed=1)
    its_optimizer = adamw(again)
    loaded = dict(zip(("module", "optimizer"), get_state_dict(again, its_optimizer), strict=True))
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(again, its_optimizer, model_state_dict=loaded["module"],
                   optim_state_dict=loaded["optimizer"])  # fmt: skip
    assert train(again, its_optimizer, STEPS) == train(module, optimizer, STEPS)
    assert_same(values(again), values(module))


def fsdp(rank: int, size: int, port: int, folder: Path, expected: list[float]) -> None:
    """FSDP2 over the whole module: a rank holds half of each parameter, and half the rows."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    join(rank, size, port)
    module = fm.compile_to_torch(MODEL).reset(seed=0)
    fully_shard(module)
    assert all(isinstance(p, DTensor) for p in module.parameters())
    assert sum(p.to_local().numel() for p in module.parameters()) <= MODEL.num_parameters * 0.55
    optimizer = adamw(module)
    losses = []
    for number in range(STEPS):
        tokens = batch(number).chunk(size)[rank]
        loss = loss_of(module(tokens), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / size)
    assert losses == pytest.approx(expected, rel=1e-4)
    checkpoints = fm.Checkpoints(folder)
    checkpoints.save(STEPS, {"weights": module.weights()}, {})
    checkpoints.wait()
    dist.destroy_process_group()


@pytest.mark.slow
def test_fully_shard(tmp_path):
    """And a checkpoint of its parts is one of the whole model."""
    weights, losses = pure(fm.optim.adamw(0.02))
    on_ranks(fsdp, 2, tmp_path, losses)
    got = fm.Checkpoints(tmp_path).load_weights(MODEL)
    fm.tree.map(lambda a, b: torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3), got, weights)


@pytest.mark.slow
def test_trainer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Trainer(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Tensor:
            return loss_of(model(inputs["tokens"]), inputs["tokens"])

    module = fm.compile_to_torch(MODEL).reset(seed=0)
    rows = [{"tokens": row} for number in range(STEPS) for row in batch(number)]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        weight_decay=0.0,  # it would leave out norms, which it knows by their names
        max_grad_norm=0.0,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_steps=STEPS,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=module,
        args=settings,
        train_dataset=rows,
        data_collator=lambda rows: {"tokens": torch.stack([row["tokens"] for row in rows])},
    )
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(  # in their order
        rows, batch_size=4, collate_fn=trainer.data_collator
    )
    trainer.train()
    weights, losses = pure(fm.optim.adamw(0.02, weight_decay=0.0))
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(losses, abs=1e-3)  # it logs four digits
    close = {"atol": 1e-5, "rtol": 1e-4}
    fm.tree.map(lambda a, b: torch.testing.assert_close(a, b, **close), values(module), weights)
    saved = next(tmp_path.glob("checkpoint-*/model.safetensors"))
    assert saved.stat().st_size > 4 * MODEL.num_parameters
