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


def loss_of(logits: Tensor) -> Tensor:
    weight = torch.sin(torch.arange(logits.numel(), dtype=logits.dtype)).reshape(logits.shape)
    return (logits * weight).sum() + logits.square().sum() / 10


_last: list[Any] = []  # what `whole` was given last, and what it found: all ranks ask for the same


def whole(model: fm.Model, weights: Any, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
    """A model's own logits, and the gradients of `loss_of` by its weights."""
    given = (model, weights, tokens, positions)
    if not _last or any(a is not b for a, b in zip(_last[0], given, strict=True)):
        # By autograd, not torch.func.grad: that one refuses torch.utils.checkpoint inside a model.
        own = fm.tree.map(lambda w: w.detach().clone().requires_grad_(), weights)
        want = model.forward(own, tokens, positions)
        found = torch.autograd.grad(
            loss_of(want), fm.tree.leaves(own), allow_unused=True, materialize_grads=True
        )
        grads = fm.tree.unflatten(own, dict(zip(dict(fm.tree.items(own)), found, strict=True)))
        _last[:] = given, (want.detach(), grads)
    return _last[1]


def assert_near(found: Tensor, want: Tensor, rtol: float, of: str = "logits") -> None:
    """Within rtol of the largest element, and of each."""
    atol = rtol * (1 + want.abs().max().item()) if want.numel() else 0.0
    same = found.dtype == want.dtype and found.shape == want.shape
    if not same or not torch.allclose(found, want, rtol=rtol, atol=atol):
        # The words are this one's; asked every time, it would take as long as the programs.
        torch.testing.assert_close(found, want, rtol=rtol, atol=atol, msg=lambda m: f"{of}: {m}")
        raise AssertionError(f"{of}: {found} is not near {want}")


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
    want, grads = whole(program.model, weights, tokens, positions)
    shards = {
        path: [v.detach().clone().requires_grad_() for v in values]
        for path, values in evaluate.local_weights(local, weights, comm).items()
    }
    logits = evaluate.run(local, shards, tokens, positions, comm)
    for one in logits:
        assert_near(one, want, rtol)
    leaves = [v for values in shards.values() for v in values]
    total = torch.stack([loss_of(one) for one in logits]).sum()
    found = iter(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
    expected = evaluate.local_weights(local, grads, comm)
    for path in shards:
        for rank in range(parts):
            assert_near(
                next(found),
                expected[path][rank],
                rtol,
                f"gradient of {path} on rank {rank} of {parts}",
            )
