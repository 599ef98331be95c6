"""vLLM's layers as operations of the graph, each with its meaning in plain torch.

The passes rewrite a partitioned program into these; `compiler.emit` writes each as the layer it
stands for; the evaluator runs them by the functions here, which is how a pass is checked.
Activations are flat: (num_tokens, features).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compiler import collectives
from compiler.comm import Comm
from compiler.evaluate import GROUP_FUNCTIONS, RANK_FUNCTIONS
from compiler.rules import vocab_embed
from funcmodels import ops


@dataclass(frozen=True)
class Matrix:
    """A parameter seen as [out, in]: which of its dims are the rows, and which the columns."""

    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]

    def of(self, w: Tensor) -> Tensor:
        """The matrix itself."""
        rows = prod(w.shape[d] for d in self.out_dims)
        return w.permute(*self.out_dims, *self.in_dims).reshape(rows, -1)


# The layers a linear can be; "row_partial" is a row-parallel one that leaves its sum pending.
KINDS = ("replicated", "column", "merged_column", "qkv", "row", "row_partial")


def linear(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
    *,
    kind: str,
    matrices: tuple[Matrix, ...],
) -> Tensor:
    """x @ [w0; w1; ...].T + [b0; b1; ...], with the rows or the columns of each w cut by rank."""
    out = [F.linear(x, m.of(w)) for w, m in zip(weights, matrices, strict=True)]
    if biases and kind != "row":
        out = [y + b.reshape(-1) for y, b in zip(out, biases, strict=True)]
    return torch.cat(out, dim=-1) if len(out) > 1 else out[0]


def _linear(comm: Comm, calls: list[tuple[tuple, dict]]) -> list[Tensor]:
    """A linear on all ranks; a row-parallel one sums over them and then adds its bias."""
    out = [linear(*args, **kwargs) for args, kwargs in calls]
    if calls[0][1]["kind"] != "row":
        return out
    out = comm.run(collectives.all_reduce, out, ())
    biases = calls[0][0][2]
    return [y + biases[0].reshape(-1) for y in out] if biases else out


def rotary(
    positions: Tensor, q: Tensor, k: Tensor, *, head_dim: int, **settings: Any
) -> tuple[Tensor, Tensor]:
    """`ops.rope` on flat q and k: the only form that the engine's CPU kernel computes rightly."""
    q_heads, k_heads = (t.reshape(t.shape[0], -1, head_dim) for t in (q, k))
    out = ops.rope(q_heads, k_heads, positions, **settings)
    return out[0].reshape(q.shape), out[1].reshape(k.shape)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, head_dim: int, v_head_dim: int, **settings: Any
) -> Tensor:
    """`ops.attention` on flat q, k and v."""
    settings = {key: value for key, value in settings.items() if key not in ("heads", "kv_heads")}
    sizes = (head_dim, head_dim, v_head_dim)
    heads = [t.reshape(t.shape[0], -1, n) for t, n in zip((q, k, v), sizes, strict=True)]
    return ops.attention(*heads, **settings).reshape(q.shape[0], -1)


def latent_attention(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, kv: Tensor, **settings: Any
) -> Tensor:
    """`ops.latent_attention`, with the keys and values that `kv_b_proj` makes of the latent.

    The layer is given that linear, not its result: while decoding, the engine multiplies queries
    and outputs by the two halves of its matrix instead. `latent` is what is cached, with `k_rope`.
    """
    tokens, heads, nope = q_nope.shape
    kv = kv.reshape(tokens, heads, -1)
    key = torch.cat((kv[..., :nope], k_rope.expand(-1, heads, -1)), dim=-1)
    query, scale = torch.cat((q_nope, q_rope), dim=-1), settings.get("scale")
    return ops.attention(query, key, kv[..., nope:], scale=scale).reshape(tokens, -1)


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    matrices: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    *,
    kind: str,
    **settings: Any,
) -> Tensor:
    """`ops.experts` of (gate, up, down), and biases or none, on one rank: all but "replicated" cut.

    Of "row" the sum over ranks is taken, of "row_partial" it is left pending.
    """
    gate_bias, up_bias, down_bias = biases or (None, None, None)
    named = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    gate, up, down = matrices
    return ops.experts(x, weights, ids, gate, up, down, **named, **settings)


def _experts(comm: Comm, calls: list[tuple[tuple, dict]]) -> list[Tensor]:
    """Experts on all ranks; the bias after them is the first rank's alone."""
    kind = calls[0][1]["kind"]
    out = []
    for rank, (args, kwargs) in zip(comm.ranks, calls, strict=True):
        x, weights, ids, matrices, biases = args
        if biases and kind != "replicated" and rank > 0:
            biases = (*biases[:2], None)
        out.append(experts(x, weights, ids, matrices, biases, **kwargs))
    return comm.run(collectives.all_reduce, out, ()) if kind == "row" else out


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    rounds_once: bool = False,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum. Without a residual, of x, and x."""
    total = x if residual is None else x + residual
    return ops.rms_norm(total, weight, eps=eps, offset=offset, rounds_once=rounds_once), total


def silu_and_mul(x: Tensor) -> Tensor:
    """silu of the first half of the features, times the second."""
    gate, up = x.chunk(2, dim=-1)
    return ops.swiglu(gate, up)


def gelu_and_mul(x: Tensor, *, approximate: Literal["none", "tanh"]) -> Tensor:
    """gelu of the first half of the features, times the second."""
    gate, up = x.chunk(2, dim=-1)
    return ops.geglu(gate, up, approximate=approximate)


def vocab_embedding(tokens: Tensor, table: Tensor, vocab: int, axis: str) -> Tensor:
    """Rows of a vocabulary that is divided over ranks, summed over them: whole on each."""
    raise AssertionError("vocab_embedding is carried out by compiler.comm")


def _vocab_embedding(comm: Comm, calls: list[tuple[tuple, dict]]) -> list[Tensor]:
    embed = RANK_FUNCTIONS[vocab_embed]
    parts = [embed(r, comm, *args) for r, (args, _) in zip(comm.ranks, calls, strict=True)]
    return comm.run(collectives.all_reduce, parts, ())


def logits(x: Tensor, table: Tensor, axis: str) -> Tensor:
    """x @ table.T for a vocabulary that is divided over ranks, gathered: whole on each."""
    raise AssertionError("logits is carried out by compiler.comm")


def _logits(comm: Comm, calls: list[tuple[tuple, dict]]) -> list[Tensor]:
    parts = [F.linear(args[0], args[1]) for args, _ in calls]
    return comm.run(collectives.all_gather, parts, (parts[0].ndim - 1, comm.size))


GROUP_FUNCTIONS[experts] = _experts
GROUP_FUNCTIONS[linear] = _linear
GROUP_FUNCTIONS[vocab_embedding] = _vocab_embedding
GROUP_FUNCTIONS[logits] = _logits
