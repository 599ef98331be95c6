"""A user's own modules, made of the layers: as they stand alone, on ranks, and in the engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmodels as fm
from funcmodels import ops

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 96, 16, 4, 2, 32, 24
EPS = 1e-6


class Attention(nn.Module):
    """With a norm of each rank's own heads, and a factor a feature that no layer holds."""

    def __init__(self, mesh=None) -> None:
        super().__init__()
        self.mesh = mesh
        self.q = fm.nn.ColumnParallelLinear(HIDDEN, HEADS * HEAD_DIM, bias=True, mesh=mesh)
        self.k = fm.nn.ColumnParallelLinear(HIDDEN, KV_HEADS * HEAD_DIM, mesh=mesh)
        self.v = fm.nn.ColumnParallelLinear(HIDDEN, KV_HEADS * HEAD_DIM, mesh=mesh)
        self.q_norm = fm.nn.RMSNorm(HEAD_DIM, eps=EPS, mesh=mesh)
        self.k_norm = fm.nn.LayerNorm(HEAD_DIM, eps=EPS, mesh=mesh)
        self.rope = fm.nn.RotaryEmbedding(HEAD_DIM, theta=100.0, max_position=64)
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, HEAD_DIM))
        self.o = fm.nn.RowParallelLinear(HEADS * HEAD_DIM, HIDDEN, bias=True, mesh=mesh)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, HEAD_DIM)) for y in (self.q(x), self.k(x), self.v(x)))
        q, k = self.rope(self.q_norm(q), self.k_norm(k), positions)
        y = ops.attention(q, k, v) * fm.nn.vary(self.factor, self.mesh)
        return self.o(y.flatten(-2))


class MLP(nn.Module):
    """One product whose outputs are gathered, one that cuts what it is given, and a gated pair."""

    def __init__(self, mesh=None) -> None:
        super().__init__()
        self.norm = fm.nn.RMSNorm(HIDDEN, eps=EPS, offset=1.0)
        self.gate = fm.nn.ColumnParallelLinear(HIDDEN, INNER, mesh=mesh)
        self.up = fm.nn.ColumnParallelLinear(HIDDEN, INNER, bias=True, mesh=mesh)
        self.down = fm.nn.RowParallelLinear(INNER, HIDDEN, mesh=mesh)
        self.wide = fm.nn.ColumnParallelLinear(HIDDEN, INNER, mesh=mesh, gather_output=True)
        self.back = fm.nn.RowParallelLinear(
            INNER, HIDDEN, bias=True, mesh=mesh, input_is_parallel=False
        )
        self.last = fm.nn.LayerNorm(HIDDEN, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.last(x + self.back(torch.tanh(self.wide(x))))


class Decoder(nn.Module):
    """A language model: one layer, and an embedding that is tied to the head."""

    def __init__(self, mesh=None) -> None:
        super().__init__()
        self.embed = fm.nn.VocabParallelEmbedding(VOCAB, HIDDEN, mesh=mesh)
        self.attn = Attention(mesh)
        self.mlp = MLP(mesh)
        self.head = fm.nn.ParallelLMHead(VOCAB, HIDDEN, mesh=mesh)
        self.head.weight = self.embed.weight

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        positions = torch.arange(tokens.shape[-1]).expand(tokens.shape)
        return self.mlp(x + self.attn(x, positions))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))

    def loss(self, tokens: Tensor) -> Tensor:
        mask = tokens[:, 1:] % 5 != 0
        return self.head.cross_entropy(self.hidden(tokens[:, :-1]), tokens[:, 1:], mask=mask)


def scaled(module: nn.Module, by: float = 2.0) -> nn.Module:
    """With every parameter moved off its first value, the same on any number of ranks."""
    gen = torch.Generator().manual_seed(1)
    state = fm.nn.whole(module)
    moved = {}
    for value in {id(p): p for p in module.parameters()}.values():
        name = next(n for n, p in module.named_parameters() if p is value)
        whole = state[name]
        moved[name] = by * whole + 0.3 * torch.randn(whole.shape, generator=gen, dtype=whole.dtype)
    return fm.nn.load_whole(module, moved)


def decoder(mesh=None) -> Decoder:
    torch.manual_seed(0)
    module = Decoder(mesh).double()
    scaled(module)
    return module


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
