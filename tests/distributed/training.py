"""A small training run, on one process or on the processes of a mesh: what the tests compare."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import funcmodels as fm
from tests import tiny_llama
from tests.distributed.ranks import DEVICE, mesh_of

STEPS, ROWS, SEQ, VOCAB = 4, 4, 8, 64


def model() -> fm.Model:
    """Grouped queries; a hidden size and an MLP that fsdp ranks divide, and a vocabulary."""
    return tiny_llama.tiny(vocab_size=VOCAB)


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and a loss mask of very different lengths, for all ranks together."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, SEQ + 1), generator=generator)
    lengths = torch.tensor([8, 2, 5, 1])
    mask = torch.arange(SEQ) < lengths[:, None]
    positions = torch.arange(SEQ).expand(ROWS, SEQ)
    return tokens.to(DEVICE), positions.to(DEVICE), mask.float().to(DEVICE)


def loaded(model: fm.Model, mesh: dict[str, int] | None, **options: Any) -> fm.CompiledModel:
    """A model with the weights of the tests, on a mesh or on one process."""
    module = fm.compile_to_torch(model, mesh_of(**mesh) if mesh else None, **options)
    module.load(tiny_llama.weights_of(model))
    return module if mesh else module.to(DEVICE)  # a mesh says itself where its weights lie


def own_rows(module: fm.CompiledModel, *tensors: Tensor) -> list[Tensor]:
    """The rows of a batch that this process trains on."""
    n, i = 1, 0
    for comm in () if module.ranks is None else module.ranks.of_data:
        n, i = n * comm.size, i * comm.size + comm.rank
    return [x.chunk(n)[i] for x in tensors]


def loss_of(module: fm.CompiledModel, weights: Any, step: int) -> Tensor:
    """The mean over all tokens of all ranks that the mask leaves."""
    return loss_on(module, weights, *own_rows(module, *batch(step)))


def loss_on(
    module: fm.CompiledModel, weights: Any, tokens: Tensor, positions: Tensor, mask: Tensor
) -> Tensor:
    """The same, of rows of this process."""
    logits = module.pure(weights, tokens[:, :-1], positions)
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return module.mean(losses, mask)


def train(mesh: dict[str, int] | None, **options: Any) -> dict[str, Any]:
    """Losses, the first gradients by torch.func and by autograd, the last weights; all whole."""
    module = loaded(model(), mesh, **options)
    weights = fm.tree.map(lambda p: p.detach(), module.weights())
    losses, first = [], None
    for step in range(STEPS):
        grads, loss = torch.func.grad_and_value(lambda w, s=step: loss_of(module, w, s))(weights)
        first = first or grads
        losses.append(loss)
        weights = fm.tree.map(lambda w, g: w - 0.3 * g, weights, grads)
    loss_of(module, module.weights(), 0).backward()
    by_autograd = fm.tree.map(lambda p: p.grad, module.weights())
    return {
        "losses": torch.stack(losses),
        "functional": dict(fm.tree.items(module.whole(first))),
        "autograd": dict(fm.tree.items(module.whole(by_autograd))),
        "weights": dict(fm.tree.items(module.whole(weights))),
        "numel": sum(p.numel() for p in module.parameters()),
    }


def train_all(meshes: dict[str, tuple[dict[str, int], dict[str, Any]]]) -> dict[str, Any]:
    """`train` on each of some meshes."""
    return {name: train(mesh, **options) for name, (mesh, options) in meshes.items()}
