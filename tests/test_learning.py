"""A small model learns: the loss falls to a stated level in a fixed number of steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import funcmodels as fm
from tests.tiny_llama import tiny

torch.set_num_threads(1)

STEPS = 60


def sequences(generator: torch.Generator) -> torch.Tensor:
    """Counting up from a random start, modulo 16: one token tells the next, (16, 12)."""
    start = torch.randint(0, 16, (16, 1), generator=generator)
    return (start + torch.arange(12)) % 16


def test_loss_falls():
    model = tiny(vocab_size=16, num_hidden_layers=1)
    weights = fm.init(model, seed=0)
    generator = torch.Generator().manual_seed(0)

    def loss_fn(weights, tokens):
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        logits = model.forward(weights, tokens, positions)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    step = torch.func.grad_and_value(loss_fn)
    momentum = fm.tree.map(torch.zeros_like, weights)
    losses = []
    for _ in range(STEPS):
        grads, loss = step(weights, sequences(generator))
        momentum = fm.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        weights = fm.tree.map(lambda w, m: w - 0.05 * m, weights, momentum)
        losses.append(float(loss))
    assert losses[0] > 2.5  # about log 16
    assert losses[-1] < 0.05
    assert fm.generate(model, weights, [14], max_new_tokens=4) == [15, 0, 1, 2]
