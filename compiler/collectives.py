"""Collectives as nodes of a graph, with what their gradients are.

A value's gradient lies as the value does, except that the gradient of a `Partial` value is whole.
Then each collective's backward is another one, as in Megatron's f and g and JAX's `pvary`:

    node            forward                     backward
    all_reduce      sum over ranks              identity
    vary            identity                    sum over ranks
    all_gather      blocks -> whole             own block
    take_block      whole -> own block          blocks -> whole
    replica_sum     identity                    sum over the ranks that hold the same block
    reduce_scatter  own block of the sum        blocks -> whole
    gather_vary     blocks -> whole             own block of the sum

The functions here only name the nodes; `compiler.comm` carries them out.
"""

from __future__ import annotations

from torch import Tensor


def all_reduce(x: Tensor, axis: str) -> Tensor:
    """Sum over the ranks of a mesh axis: `Partial` -> `Replicate`."""
    raise _only_evaluated("all_reduce")


def vary(x: Tensor, axis: str) -> Tensor:
    """A whole value as ranks use it differently from here on: its gradient is summed over them."""
    raise _only_evaluated("vary")


def all_gather(x: Tensor, dim: int, units: int, axis: str) -> Tensor:
    """The whole of a value that is cut along a dim: `Shard` -> `Replicate`."""
    raise _only_evaluated("all_gather")


def take_block(x: Tensor, dim: int, units: int, axis: str) -> Tensor:
    """A rank's own block of a whole value: `Replicate` -> `Shard`."""
    raise _only_evaluated("take_block")


def replica_sum(x: Tensor, units: int, axis: str) -> Tensor:
    """A block that several ranks may hold: its gradient is summed over those that do."""
    raise _only_evaluated("replica_sum")


def reduce_scatter(x: Tensor, dim: int, axis: str) -> Tensor:
    """A rank's own block of the sum over ranks: `Partial` -> `Shard`."""
    raise _only_evaluated("reduce_scatter")


def gather_vary(x: Tensor, dim: int, axis: str) -> Tensor:
    """The whole of a value that is cut, as ranks use it differently: `all_gather` and `vary`."""
    raise _only_evaluated("gather_vary")


ALL = (all_reduce, vary, all_gather, take_block, replica_sum, reduce_scatter, gather_vary)


def _only_evaluated(name: str) -> AssertionError:
    return AssertionError(f"{name} is carried out by compiler.comm")
