"""A module of your own, made of `fm.nn`'s layers: trained alone, and on two ranks that share it.

    python -m examples.parallel_modules
    torchrun --nproc-per-node 2 -m examples.parallel_modules

Both print the same losses. It is an ordinary `nn.Module`, with an ordinary optimiser and loop.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import funcmodels as fm
from funcmodels import ops

TEXT = Path(__file__).parent / "data" / "lighthouse.txt"
VOCAB, HIDDEN, CONTEXT = 256, 32, 8


class MLP(nn.Module):
    """A gated block: its inner features are shared by the ranks, what goes in and out is whole."""

    def __init__(self, hidden: int, inner: int, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.norm = fm.nn.RMSNorm(hidden, eps=1e-6)
        self.gate = fm.nn.ColumnParallelLinear(hidden, inner, mesh=mesh)
        self.up = fm.nn.ColumnParallelLinear(hidden, inner, mesh=mesh)
        self.down = fm.nn.RowParallelLinear(inner, hidden, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(ops.swiglu(self.gate(h), self.up(h)))


class NextByte(nn.Module):
    """Guesses a byte from the bytes before it."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.embed = fm.nn.VocabParallelEmbedding(VOCAB, HIDDEN, mesh=mesh)
        self.blocks = nn.Sequential(*(MLP(CONTEXT * HIDDEN, 512, mesh) for _ in range(2)))
        self.head = fm.nn.ParallelLMHead(VOCAB, CONTEXT * HIDDEN, mesh=mesh)

    def loss(self, windows: Tensor) -> Tensor:
        """The mean cross-entropy; windows (batch, CONTEXT + 1) of byte values."""
        x = self.embed(windows[:, :-1]).flatten(-2)
        return self.head.cross_entropy(self.blocks(x), windows[:, -1])


def train(mesh: DeviceMesh | None, steps: int = 60) -> tuple[NextByte, list[float]]:
    """The same on any number of ranks: each has the same batches, and a part of the layers."""
    torch.manual_seed(0)  # layers keep their parts of what one process would draw
    module = NextByte(mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    text = torch.tensor(list(TEXT.read_bytes())).unfold(0, CONTEXT + 1, 1)
    batches = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        loss = module.loss(text[torch.randint(len(text), (128,), generator=batches)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return module, losses


def main() -> None:
    mesh = None
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    module, losses = train(mesh)
    held = sum(p.numel() for p in module.parameters())
    whole = fm.nn.whole(module)  # on every rank: all of them must ask
    if mesh is None or mesh.get_rank() == 0:
        everything = sum(x.numel() for x in whole.values())
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, ", end="")
        print(f"{held:,} of {everything:,} parameters on this rank")
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
