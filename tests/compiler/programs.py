"""Small models for the compiler's tests, and the two ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import funcmodels as fm
from compiler import evaluate
from compiler.comm import Comm, Simulated
from compiler.ir import Program
from compiler.partition import Partitioned

torch.set_num_threads(1)  # the tensors here are tiny

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 24, 16, 4, 2, 4, 12
TABLE: dict[str, str | None] = {"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"}


def axes() -> fm.Axes:
    """The axes that the small models share."""
    return fm.axes(
        vocab=VOCAB,
        hidden=HIDDEN,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        mlp=MLP,
        heads_dim=HEADS * HEAD_DIM,
        one=1,
    )


def small(
    forward: Callable[..., Any],
    params: dict[str, Any] | None = None,
    sharding: dict[str, str | None] | None = None,
    name: str = "Small",
) -> fm.Model:
    """A model of a forward function, with `embed` and `head` beside the given parameters.

    Of the table, what the parameters have no axis for is left out.
    """
    P = axes()
    tree = {"embed": P("vocab hidden"), "head": P("vocab hidden")} | (params or {})
    declared = {axis for param in fm.tree.leaves(tree) for axis in param.axes}
    table = {axis: mesh for axis, mesh in (sharding or {}).items() if axis in declared}
    return fm.Model(name, None, tree, forward, sharding=table)


def weights_of(model: fm.Model, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Weights far from zero, so that no difference hides in small values."""

    def draw(path: str, param: fm.Param) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, path)))
        value = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        width = param.shape[-1] if len(param.shape) > 1 else 1
        return (1.3 * value / width**0.5).to(param.dtype or dtype)

    return fm.tree.map_with_path(draw, model.params)


def inputs_of(*shape: int, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    """Tokens and positions; (num_tokens,) or (batch, seq)."""
    tokens = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(sum(shape)))
    return tokens, torch.arange(shape[-1]).expand(shape)


def evaluated(program: Program, weights: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    """A program on one rank."""
    comm = Simulated(1)
    local = evaluate.local_weights(program, weights, comm)
    (logits,) = evaluate.run(program, local, tokens, positions, comm)
    return logits


def on_ranks(
    program: Program, weights: Any, tokens: Tensor, positions: Tensor, comm: Comm
) -> list[Tensor]:
    """A partitioned program on the ranks of `comm`."""
    local = evaluate.local_weights(program, weights, comm)
    return evaluate.run(program, local, tokens, positions, comm)


def allowed(program: Partitioned, parts: int) -> bool:
    """Whether a partitioned program may run on so many ranks."""
    return all(need.allows(parts) for need in program.needs)


def check_on_ranks(
    program: Program,
    local: Partitioned,
    parts: int,
    weights: Any,
    tokens: Tensor,
    positions: Tensor,
    rtol: float = 1e-9,
) -> None:
    """The partitioned program equals the model's function, with the gradients of every rank.

    A whole parameter's gradient is whole on each rank; a cut one's is the block of the whole
    gradient, on every rank that holds the block.
    """
    comm = Simulated(parts)

    def loss_of(logits: Tensor) -> Tensor:
        weight = torch.sin(torch.arange(logits.numel(), dtype=logits.dtype)).reshape(logits.shape)
        return (logits * weight).sum() + logits.square().sum() / 10

    # By autograd, not torch.func.grad: that one refuses torch.utils.checkpoint inside a model.
    whole = fm.tree.map(lambda w: w.detach().clone().requires_grad_(), weights)
    want = program.model.forward(whole, tokens, positions)
    given = torch.autograd.grad(
        loss_of(want), fm.tree.leaves(whole), allow_unused=True, materialize_grads=True
    )
    grads = fm.tree.unflatten(whole, dict(zip(dict(fm.tree.items(whole)), given, strict=True)))
    want = want.detach()
    shards = {
        path: [v.detach().clone().requires_grad_() for v in values]
        for path, values in evaluate.local_weights(local, weights, comm).items()
    }
    logits = evaluate.run(local, shards, tokens, positions, comm)
    for one in logits:
        torch.testing.assert_close(one, want, rtol=rtol, atol=rtol * (1 + want.abs().max().item()))
    leaves = [v for values in shards.values() for v in values]
    total = sum(loss_of(one) for one in logits)
    found = iter(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
    expected = evaluate.local_weights(local, grads, comm)
    for path in shards:
        for rank in range(parts):
            torch.testing.assert_close(
                next(found),
                expected[path][rank],
                rtol=rtol,
                atol=rtol * (1 + expected[path][rank].abs().max().item()),
                msg=lambda m, p=path, r=rank: f"gradient of {p} on rank {r} of {parts}: {m}",
            )
