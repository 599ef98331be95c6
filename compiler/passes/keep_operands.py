"""Copies of what the engine's layers would overwrite, where it is read afterwards."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from compiler import collectives, layers
from compiler.ir import Block, Program, TensorType
from compiler.rewrite import copy_block, insert, is_call
from compiler.rules import RULES, max_over_ranks, rms_norm_over_ranks, share_of_mean
from compiler.views import may_share_memory

# Which operands each writes into: the engine's kernels work in place.
_OVERWRITES: dict[Any, tuple[int, ...]] = {
    layers.rotary: (1, 2),
    layers.add_rms_norm: (0, 1),
    collectives.all_reduce: (0,),
}
_PARTS = (torch.split, torch.chunk, torch.unbind)  # of which each result is memory of its own
_OURS = (layers.linear, layers.experts, layers.attention, layers.silu_and_mul, layers.gelu_and_mul,
         layers.vocab_embedding, layers.latent_attention,
         layers.logits, rms_norm_over_ranks, max_over_ranks, share_of_mean)  # fmt: skip

# A piece of memory: the node that made it, then which part of which split; a prefix contains it.
Piece = tuple[Any, ...]
Memory = frozenset[Piece]
_NEVER: Memory = frozenset({("never",)})  # not to be written: a parameter, or an expanded value


def keep_operands(program: Program) -> Program:
    """Hand a layer a copy of an operand that it overwrites and that is read later.

        q2, k2 = rotary(positions, q, k); o = attention(q2, k2, k)
    ->
        k3 = clone(k); q2, k2 = rotary(positions, q, k3); o = attention(q2, k2, k)

    Each kernel is right on its own; together they would give wrong values without an error.
    """
    effects: dict[str, _Effects] = {}
    changed: dict[str, Block] = {}
    for block in _callees_first(program):
        try:
            effects[block.name] = _Block(block, effects, is_own=False).run()
        except _MustChangeError:
            changed[block.name] = own = copy_block(block)
            effects[block.name] = _Block(own, effects, is_own=True).run()
    if not changed:
        return program
    root = changed.pop(program.root.name, program.root)
    return replace(program, root=root, blocks=program.blocks | changed)


def _callees_first(program: Program) -> list[Block]:
    """Every block after those that it calls."""
    found: dict[str, Block] = {}

    def visit(block: Block) -> None:
        for call in block.calls:
            if str(call.target) not in found:
                visit(program.blocks[str(call.target)])
        found[block.name] = block

    for block in program.all():
        visit(block)
    return list(found.values())


class _MustChangeError(Exception):
    """A block needs a copy of an operand, and is not ours to change."""


class _Effects:
    """What a block does to its inputs' memory: which it overwrites, and which its results are."""

    def __init__(self, overwrites: set[int], results: list[set[int]]) -> None:
        self.overwrites = overwrites
        self.results = results


class _Block:
    def __init__(self, block: Block, effects: dict[str, _Effects], *, is_own: bool) -> None:
        self.block = block
        self.is_own = is_own
        self.effects = effects
        self.memory: dict[fx.Node, Memory] = {}
        self.order = {node: i for i, node in enumerate(block.graph.nodes)}
        self.made: dict[Any, list[fx.Node]] = {}  # maker of memory -> values that are in it
        self.written: set[fx.Node] = set()
        # Operands that were overwritten: what they held is gone, so their memory starts anew.
        self.taken: dict[tuple[fx.Node, int], set[Any]] = {}

    def run(self) -> _Effects:
        for node in list(self.block.graph.nodes):
            if node.op == "output":
                continue
            for at in self._overwrites(node):
                self._protect(node, at)
            self.memory[node] = self._memory_of(node)
            for piece in self.memory[node]:
                self.made.setdefault(piece[0], []).append(node)
        inputs = self.block.inputs
        results = [
            {inputs.index(m) for m in self._makers(r) if m in inputs} for r in self.block.results
        ]
        return _Effects({i for i, node in enumerate(inputs) if node in self.written}, results)

    def _makers(self, node: fx.Node) -> set[Any]:
        found: set[Any] = set()
        for piece in self.memory[node]:
            found |= self.taken.get(piece[0], {piece[0]})
        return found

    def _overwrites(self, node: fx.Node) -> list[int]:
        """The places of the operands that a node writes into."""
        if node.op == "call_module":
            places: Any = sorted(self.effects[str(node.target)].overwrites)
        else:
            places = _OVERWRITES.get(node.target, ()) if node.op == "call_function" else ()
        return [i for i in places if isinstance(node.args[i], fx.Node)]

    def _protect(self, node: fx.Node, at: int) -> None:
        """Let a node write into a copy of an operand, if anything else needs that."""
        operand = node.args[at]
        assert isinstance(operand, fx.Node)
        if self._is_needed(operand, node, at):
            if not self.is_own:
                raise _MustChangeError
            copy = insert(self.block, node, torch.clone, (operand,), like=operand)
            node.update_arg(at, copy)
            self.memory[copy] = frozenset({(copy,)})
            self.order[copy] = self.order[node]
        else:
            self.taken[node, at] = self._makers(operand)
            self.written |= self.taken[node, at]

    def _is_needed(self, operand: fx.Node, node: fx.Node, at: int) -> bool:
        """Whether memory is read after a node, not to be written at all, or given to it twice."""
        memory = self.memory[operand]
        if memory & _NEVER:
            return True
        others = [a for i, a in enumerate(node.args) if i != at and isinstance(a, fx.Node)]
        if any(_overlap(memory, self.memory[other]) for other in others):
            return True
        values = {v for piece in memory for v in self.made.get(piece[0], ())} | {operand}
        return any(
            self.order[user] > self.order[node]
            for value in values
            if _overlap(memory, self.memory[value])
            for user in value.users
        )

    def _memory_of(self, node: fx.Node) -> Memory:
        own = frozenset({(node,)})
        if node.op == "get_attr":
            return _NEVER
        if node.op == "placeholder":
            return own
        if node.op == "call_module":  # several results are told apart by index
            found = self.effects[str(node.target)].results
            passed = found[0] if isinstance(node.meta["type"], TensorType) else ()
            return own.union(*(self._operand(node, i) for i in passed))
        if is_call(node, operator.getitem):
            return self._part(node)
        # Of a function without a rule nothing is known.
        known = node.target in RULES or node.target in _OURS or node.target is torch.clone
        if known and not may_share_memory(node):
            return own
        never = _NEVER if node.target is Tensor.expand else frozenset()
        return own.union(never, *(self.memory[n] for n in node.all_input_nodes))

    def _part(self, node: fx.Node) -> Memory:
        """The memory of an element of a tuple, or of a view by index."""
        whole, index = node.args
        assert isinstance(whole, fx.Node)
        if is_call(whole, *_PARTS):
            source = self.memory[whole.all_input_nodes[0]]
            return frozenset((*piece, (whole, index)) for piece in source)
        if is_call(whole, layers.rotary):
            return self._operand(whole, 1 + int(index))  # type: ignore[arg-type]
        if is_call(whole, layers.add_rms_norm):
            x, residual = self._operand(whole, 0), self._operand(whole, 1)
            return x if index == 0 else x | residual if _optional(whole.args[1]) else residual
        if whole.op == "call_module":
            found = self.effects[str(whole.target)].results[int(index)]  # type: ignore[arg-type]
            return frozenset({(node,)}).union(*(self._operand(whole, i) for i in found))
        return self.memory[whole] | {(node,)}

    def _operand(self, node: fx.Node, at: int) -> Memory:
        """The memory of an operand after a node, which may have written into it."""
        if (node, at) in self.taken:
            return frozenset({((node, at),)})
        value = node.args[at]
        return self.memory[value] if isinstance(value, fx.Node) else frozenset()


def _optional(residual: Any) -> bool:
    """Whether a residual may be none: then the first operand takes its place."""
    return not isinstance(residual, fx.Node) or "optional" in residual.meta


def _overlap(a: Memory, b: Memory) -> bool:
    return any(x[: len(y)] == y[: len(x)] for x in a for y in b)
