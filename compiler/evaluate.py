"""The reference evaluator: a program run node by node, on one rank or on several in lock step.

It is the oracle of every pass, and of what `compile_to_torch` runs, which `compiler.link` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from compiler import collectives, loss_over_ranks, over_ranks
from compiler.associative import associative, run_associative
from compiler.comm import Comm, Simulated
from compiler.ir import MODEL_DTYPE, Block, LocalSize, Program, Sym, binding, is_factory
from compiler.placement import Placement, Shard
from compiler.recurrence import Recurrence, recurrence
from compiler.rules import (
    LocalValues,
    cross_entropy_over_ranks,
    max_over_ranks,
    rms_norm_over_ranks,
    vocab_embed,
)
from compiler.run_recurrence import run_recurrence
from compiler.taken_apart import TakenApart
from funcmodels import tree

# What runs a node whose function depends on the rank: (values of one rank, rank, comm) -> value.
RankFunction = Callable[..., Any]
RANK_FUNCTIONS: dict[Any, RankFunction] = {}
# And one that needs all ranks at once: (comm, [(args, kwargs) of each rank]) -> [value of each].
GROUP_FUNCTIONS: dict[Any, Callable[..., Any]] = {}
Seen = Callable[[fx.Node, list[Any]], None]


def run(
    program: Program,
    weights: dict[str, list[Tensor]],
    tokens: Tensor,
    positions: Tensor,
    comm: Comm | None = None,
    *,
    segment_ids: Tensor | None = None,
    seen: Seen | None = None,
) -> list[Tensor]:
    """Run a program.

    Args:
        program: traced, partitioned or after any pass.
        weights: the local parameters by path, one a rank of `comm`.
        tokens, positions: int64, of the rank the program was traced with.
        comm: how ranks reach each other; None for a program of one rank.
        segment_ids: as tokens, for a program that was traced with them.
        seen: told of each operation as it is done, with its value on each rank.
    Returns:
        The logits, one tensor a rank of `comm`.
    """
    comm = comm or Simulated(1)
    dtype = model_dtype(program, weights)
    sizes = symbol_sizes(tokens)
    given = [tokens, positions, *([] if segment_ids is None else [segment_ids])]
    inputs = [[value for _ in comm.ranks] for value in given]
    ran = _Run(program, comm, sizes, dtype, tokens.device, seen)
    (logits,) = ran.block(program.root, weights, inputs)
    return logits


def run_block(
    program: Program, block: Block, inputs: list[Tensor], sizes: dict[str, int], dtype: torch.dtype
) -> list[Tensor]:
    """The results of a block that has no parameters, for sizes of its symbols, on one rank."""
    ran = _Run(program, Simulated(1), sizes, dtype, torch.device("cpu"))
    return [value for (value,) in ran.block(block, {}, [[value] for value in inputs])]


def symbol_sizes(tokens: Tensor) -> dict[str, int]:
    """The symbols of a traced program, from the tokens it is run on."""
    names = ("num_tokens",) if tokens.ndim == 1 else ("batch", "seq")
    return dict(zip(names, tokens.shape, strict=True))


def model_dtype(program: Program, weights: dict[str, list[Tensor]]) -> torch.dtype:
    """The dtype of the weights that declare none of their own."""
    for path, param in program.model.by_path.items():
        if param.dtype is None:
            return weights[path][0].dtype
    return torch.float32


def local_weights(program: Program, weights: Any, comm: Comm) -> dict[str, list[Tensor]]:
    """The blocks of a pytree of whole weights that the ranks of `comm` hold, by path."""
    placements = param_placements(program)
    out = {}
    if isinstance(program.model, TakenApart):
        weights = program.model.of(weights)
    for path, value in tree.items(weights):
        at = placements.get(path)
        out[path] = [
            comm.block(value, rank, at.dim, at.units) if isinstance(at, Shard) else value
            for rank in comm.ranks
        ]
    return out


def param_placements(program: Program) -> dict[str, Placement]:
    """Where each parameter lies, by path, for those that the program uses."""
    found: dict[str, Placement] = {}

    def visit(block: Block, names: dict[str, str]) -> None:
        for node in block.graph.nodes:
            if node.op == "get_attr" and "placement" in node.meta:
                found[names[str(node.target)]] = node.meta["placement"]
            if node.op == "call_module":
                callee = program.blocks[str(node.target)]
                visit(callee, {inner: names[outer] for inner, outer in binding(node).items()})

    visit(program.root, {name: name for name in program.root.params})
    return found


class _Run:
    def __init__(
        self,
        program: Program,
        comm: Comm,
        sizes: dict[str, int],
        dtype: torch.dtype,
        device: torch.device,
        seen: Seen | None = None,
    ) -> None:
        self.program = program
        self.comm = comm
        self.sizes = sizes
        self.dtype = dtype
        self.device = device
        self.seen = seen

    def block(
        self, block: Block, weights: dict[str, list[Tensor]], inputs: list[list[Any]]
    ) -> list[list[Tensor]]:
        """The results of a block, each a list of one value a rank."""
        env: dict[fx.Node, list[Any]] = {}
        given = iter(inputs)
        for node in block.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = weights[str(node.target)]
            elif node.op == "call_module":
                env[node] = self._call(node, weights, env)
            elif node.op == "call_function":
                env[node] = self._function(node, env)
                if self.seen is not None:
                    self.seen(node, env[node])
        return [env[node] for node in block.results]

    def _call(self, node: fx.Node, weights: Any, env: Any) -> list[Any]:
        callee, n = self.program.blocks[str(node.target)], len(self.comm.ranks)
        bound = {inner: weights[outer] for inner, outer in binding(node).items()}
        results = self.block(
            callee, bound, [env[a] if isinstance(a, fx.Node) else [a] * n for a in node.args]
        )
        if isinstance(node.meta["type"], tuple):
            return [tuple(values) for values in zip(*results, strict=True)]
        return results[0]

    def _function(self, node: fx.Node, env: dict[fx.Node, list[Any]]) -> list[Any]:
        if node.target is recurrence:
            return self._recurrence(node, env)
        if node.target is associative:
            xs: Any = map_arg(node.args[0], lambda n: env[n])
            found: Any = node.kwargs
            return list(
                zip(*run_associative(self, found["combine"].block, xs, found["dim"]), strict=True)
            )
        if node.target in collectives.ALL:
            x, *args = node.args
            assert isinstance(x, fx.Node)
            return self.comm.run(node.target, env[x], tuple(args[:-1]))
        out = []
        calls = [
            self.concrete((node.args, node.kwargs), env, i, rank)
            for i, rank in enumerate(self.comm.ranks)
        ]
        if node.target in GROUP_FUNCTIONS:
            return GROUP_FUNCTIONS[node.target](self.comm, calls)
        for rank, (args, kwargs) in zip(self.comm.ranks, calls, strict=True):
            special = RANK_FUNCTIONS.get(node.target)
            if is_factory(node):
                kwargs = {**kwargs, "device": self.device}
            if special is not None:
                out.append(special(rank, self.comm, *args, **kwargs))
            else:
                out.append(node.target(*args, **kwargs))  # type: ignore[operator]
        return out

    def _recurrence(self, node: fx.Node, env: dict[fx.Node, list[Any]]) -> list[Any]:
        """Its step or its chunked form, on all ranks in lock step."""
        found: Recurrence = node.kwargs["recurrence"]  # type: ignore[assignment]
        given: Any = map_arg(node.args, lambda n: env[n])
        xs, params, segment_ids = given
        ids = None if segment_ids is None else segment_ids[0]
        results = run_recurrence(self, found, list(xs), list(params), ids)
        return list(zip(*results, strict=True))

    def with_sizes(self, sizes: dict[str, int]) -> _Run:
        """The same, for a block of other numbers of tokens."""
        return _Run(self.program, self.comm, sizes, self.dtype, self.device, self.seen)

    def concrete(self, args: Any, env: Any, i: int, rank: int) -> Any:
        """Arguments with nodes, sizes and dtypes as they are on one rank."""

        def one(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                return env[leaf][i]
            if isinstance(leaf, Sym):
                return leaf.at(self.sizes)
            if isinstance(leaf, LocalSize):
                return leaf.at(self.comm.size)
            if isinstance(leaf, LocalValues):
                return leaf.at(rank, self.comm.size)
            return self.dtype if leaf is MODEL_DTYPE else leaf

        return map_aggregate(args, one)


def _vocab_embed(
    rank: int, comm: Comm, tokens: Tensor, table: Tensor, vocab: int, axis: str
) -> Tensor:
    """Rows of a rank's part of the vocabulary; zeros where the token is another rank's."""
    first = vocab // comm.size * rank
    here = (tokens >= first) & (tokens < first + table.shape[0])
    rows = torch.nn.functional.embedding(torch.where(here, tokens - first, 0), table)
    return torch.where(here.unsqueeze(-1), rows, torch.zeros_like(rows))


RANK_FUNCTIONS[vocab_embed] = _vocab_embed
GROUP_FUNCTIONS[rms_norm_over_ranks] = over_ranks.rms_norm
GROUP_FUNCTIONS[max_over_ranks] = over_ranks.max_over_ranks
GROUP_FUNCTIONS[cross_entropy_over_ranks] = loss_over_ranks.cross_entropy
