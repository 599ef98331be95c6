"""Fine-tuning with `torch.func`: packed documents, AdamW over pytrees, and a loop of a few lines.

Everything here is a pure function of plain tensors in plain dicts: copy what you need.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import funcmodels as fm

TEXT = Path(__file__).parent / "data" / "lighthouse.txt"
PADDING = 0  # the segment of the unused end of a row


# --- data ----------------------------------------------------------------------------------------


def conversations(text: str) -> list[list[dict[str, str]]]:
    """Chats from a text of blocks `Q: ...` and `A: ...` with empty lines between them."""
    chats = []
    for block in text.strip().split("\n\n"):
        question, _, answer = block.partition("\nA: ")
        roles = [("user", question.removeprefix("Q: ")), ("assistant", answer)]
        chats.append([{"role": role, "content": content} for role, content in roles])
    return chats


def pack(documents: Iterable[Sequence[int]], seq: int) -> dict[str, Tensor]:
    """Documents side by side in rows of `seq` tokens, none of them cut unless longer than a row.

    Returns:
        tokens, positions (from 0 in each document) and segment_ids (from 1 in each row, and 0 for
        what is left over), each (rows, seq) int64.
    """
    rows: list[list[Sequence[int]]] = [[]]
    for document in documents:
        document = document[:seq]
        if sum(map(len, rows[-1])) + len(document) > seq:
            rows.append([])
        rows[-1].append(document)
    packed = {name: torch.zeros(len(rows), seq, dtype=torch.int64)
              for name in ("tokens", "positions", "segment_ids")}  # fmt: skip
    for i, row in enumerate(rows):
        start = 0
        for segment, document in enumerate(row, start=1):
            here = (i, slice(start, start + len(document)))
            packed["tokens"][here] = torch.tensor(document)
            packed["positions"][here] = torch.arange(len(document))
            packed["segment_ids"][here] = segment
            start += len(document)
    return packed


def batches(packed: dict[str, Tensor], rows: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of rows, in a new order in each pass over the data; without end."""
    generator = torch.Generator().manual_seed(seed)
    for _ in itertools.count():
        order = torch.randperm(len(packed["tokens"]), generator=generator)
        for chosen in order.split(rows):
            yield {name: value[chosen] for name, value in packed.items()}


# --- the loss ------------------------------------------------------------------------------------


def loss_fn(model: fm.Model, weights: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of each token given those before it in its own document."""
    tokens, segments = batch["tokens"], batch["segment_ids"]  # (rows, seq)
    logits = model.forward(weights, tokens, batch["positions"], segments)  # (rows, seq, vocab)
    # The first token of a document has none before it; the padding teaches nothing.
    learned = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != PADDING)
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    return (loss * learned.flatten()).sum() / learned.sum()


# --- AdamW ---------------------------------------------------------------------------------------


def adamw_init(weights: Any) -> dict[str, Any]:
    """The state before the first step: both moments zero."""
    return {
        "m": fm.tree.map(torch.zeros_like, weights),
        "v": fm.tree.map(torch.zeros_like, weights),
        "step": 0,
    }


def adamw(
    weights: Any,
    grads: Any,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Any, dict[str, Any]]:
    """One step: weights and state -> new weights and state.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    (b1, b2), step = betas, state["step"] + 1
    m = fm.tree.map(lambda m, g: m.lerp(g, 1 - b1), state["m"], grads)
    v = fm.tree.map(lambda v, g: v.lerp(g.square(), 1 - b2), state["v"], grads)

    def update(w: Tensor, m: Tensor, v: Tensor) -> Tensor:
        direction = m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + eps)
        return w - lr * (direction + weight_decay * w)

    return fm.tree.map(update, weights, m, v), {"m": m, "v": v, "step": step}


# --- the loop ------------------------------------------------------------------------------------


def train(
    model: fm.Model,
    weights: Any,
    data: Iterator[dict[str, Tensor]],
    *,
    steps: int,
    lr: float,
    console: Console | None = None,
) -> tuple[Any, list[float]]:
    """Some steps of AdamW, with the learning rate warmed up and then falling to zero.

    Returns:
        The new weights, and the loss before each step.
    """
    grad = torch.func.grad_and_value(lambda weights, batch: loss_fn(model, weights, batch))
    state, losses = adamw_init(weights), []
    text = TextColumn("fine-tuning  loss {task.fields[loss]}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss="?")
        for step in range(steps):
            rate = lr * min((step + 1) / 5, (steps - step) / steps)
            grads, loss = grad(weights, next(data))
            weights, state = adamw(weights, grads, state, lr=rate)
            losses.append(float(loss))
            progress.update(task, advance=1, loss=f"{losses[-1]:.3f}")
    return weights, losses


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
