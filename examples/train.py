"""Training from nothing to a served model: bytes of a text, AdamW and Muon, checkpoints, a folder.

    python -m examples.train [--steps 60] [--out examples/out/train]

Stop it with Ctrl-C, or kill it, and start it again: it goes on where it was, and ends with the same
weights. `funcmodels generate` and vLLM read the folder that it writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

import funcmodels as fm
from examples.finetune import TEXT, batches, conversations
from funcmodels.models import llama

CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def documents() -> list[list[int]]:
    """Each conversation of the text as bytes."""
    chats = conversations(TEXT.read_text())
    return [list("\n".join(turn["content"] for turn in chat).encode()) for chat in chats]


def mean_loss(model: fm.Model, weights: Any, rows: dict[str, Tensor]) -> float:
    """Of documents that are not trained on, in nats a byte."""
    with torch.no_grad():
        return float(fm.loss(model, weights, rows))


def main(
    steps: int = 60, out: Annotated[Path, typer.Option()] = Path("examples/out/train")
) -> None:
    console = Console()
    model = llama.model(llama.Config.from_hf(CONFIG))
    every = documents()
    data, held_out = fm.pack(every[8:], 256), fm.pack(every[:8], 256)

    # Muon for the matrices inside the layers, AdamW for embeddings, head and norms.
    optimizer = fm.optim.muon(
        fm.optim.wsd(0.02, total=steps, warmup=steps // 20, decay=steps // 4),
        fm.optim.matrices(model),
        rest=fm.optim.adamw(
            fm.optim.cosine(3e-3, total=steps, warmup=steps // 20),
            weight_decay=0.1,
            decay=fm.optim.not_matching("*norm*"),
        ),
    )
    fitted = fm.fit(
        model,
        fm.init(model, seed=0),
        batches(data, rows=4, seed=0),
        steps=steps,
        optimizer=optimizer,
        clip=1.0,
        evaluate=lambda weights: {"loss": mean_loss(model, weights, held_out)},
        evaluate_every=50,
        checkpoints=out / "checkpoints",
        save_every=20,
        log=out / "log.jsonl",
        console=console,
    )
    if fitted.stopped:
        console.print(f"{fitted.stopped} after step {fitted.step}; start again to go on")
        return
    loss = mean_loss(model, fitted.weights, held_out)
    fm.save(model, fitted.weights, out / "model")
    console.print(f"held-out loss {loss:.3f} nats a byte; saved to {out / 'model'}")


if __name__ == "__main__":
    typer.run(main)
