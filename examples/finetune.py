"""Fine-tuning with `fm.fit`: conversations, packed; batches by number; AdamW; a plot of the loss.

Everything here is a function of plain tensors in plain dicts: copy what you need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import funcmodels as fm

TEXT = Path(__file__).parent / "data" / "lighthouse.txt"


def conversations(text: str) -> list[list[dict[str, str]]]:
    """Chats from a text of blocks `Q: ...` and `A: ...` with empty lines between them."""
    chats = []
    for block in text.strip().split("\n\n"):
        question, _, answer = block.partition("\nA: ")
        roles = [("user", question.removeprefix("Q: ")), ("assistant", answer)]
        chats.append([{"role": role, "content": content} for role, content in roles])
    return chats


def batches(packed: dict[str, Tensor], rows: int, seed: int) -> Callable[[int], dict[str, Tensor]]:
    """Batch number n: rows of a pass over the data, in an order of each pass's own.

    A function of the number, so that a run that was stopped goes on with the next batch.
    """
    total = len(packed["tokens"])
    each = -(-total // rows)  # batches of a pass

    def batch(number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed + number // each)
        order = torch.randperm(total, generator=generator)
        chosen = order.split(rows)[number % each]
        return {name: value[chosen] for name, value in packed.items()}

    return batch


def train(
    model: fm.Model,
    weights: Any,
    data: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    lr: float,
    console: Console | None = None,
    checkpoints: Path | None = None,
) -> tuple[Any, list[float]]:
    """Some steps of AdamW, with the learning rate warmed up and then falling to zero.

    Args:
        checkpoints: a folder from which a run that was stopped goes on.
    Returns:
        The new weights, and the loss before each step.
    """
    rate = fm.optim.linear(lr, total=steps, warmup=min(5, steps))
    fitted = fm.fit(
        model,
        weights,
        data,
        steps=steps,
        optimizer=fm.optim.adamw(rate, betas=(0.9, 0.95), weight_decay=0.0),
        clip=1.0,
        checkpoints=checkpoints,
        console=console,
    )
    return fitted.weights, fitted.losses


def plot_losses(losses: Sequence[float], path: Path, title: str) -> None:
    """The loss of each step, and its running mean over an eighth of the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = max(2, len(losses) // 8)
    means = [sum(part) / len(part) for i in range(1, len(losses) + 1)
             if (part := losses[max(0, i - width) : i])]  # fmt: skip
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, "o", markersize=3, alpha=0.45, label="step")
    axes.plot(range(1, len(means) + 1), means, linewidth=2, label=f"mean of the last {width}")
    axes.set(title=title, xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
