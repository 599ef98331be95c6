"""A program -> Python functions of one rank's tensors: what `compile_to_torch` runs.

Each block becomes a `torch.fx.GraphModule`, in which a node is a plain call: sizes come in as
arguments, and the dtype, the device, the rank and its collectives are already there. So it runs at
the speed of the user's own function, and torch.compile sees nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from compiler import collectives
from compiler.associative import associative, run_associative
from compiler.comm import Processes, Simulated
from compiler.evaluate import GROUP_FUNCTIONS, RANK_FUNCTIONS
from compiler.ir import MODEL_DTYPE, Block, LocalSize, Program, Sym, binding, is_factory
from compiler.names import identifier
from compiler.recurrence import Recurrence, recurrence
from compiler.rules import LocalValues
from compiler.run_recurrence import run_recurrence
from funcmodels.finite import watching
from funcmodels.ops.einsum import einsum_of_letters
from funcmodels.remat import remat

Function = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """What a program is linked for.

    Args:
        symbols: of the sizes, as ("batch", "seq").
        dtype: of the weights that declare none of their own.
        device: of the tokens.
        comm: the ranks of the program's mesh axis; None where it has one rank.
    """

    symbols: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    comm: Processes | None


class Linker:
    """The blocks of one program, each linked once."""

    def __init__(self, program: Program, setting: Setting) -> None:
        self.program = program
        self.setting = setting
        self.done: dict[str, Function] = {}  # by the block's name

    def block(self, name: str) -> Function:
        """A callee as `f(*sizes, *inputs, *params)`, which returns a tuple of its results.

        It computes its values again in a backward pass, where the user's block does.
        """
        fn = self.kept(name)
        return remat(fn) if self.program.blocks[name].remat else fn

    def kept(self, name: str) -> Function:
        """A callee of which a backward pass has all values, whatever the user's block does."""
        if name not in self.done:
            block = self.program.blocks[name]
            self.done[name] = _watched(block, self.function(block))
        return self.done[name]

    def function(self, block: Block) -> Function:
        """A block as `f(*sizes, *inputs, *params)`, with its parameters in their order."""
        return _BlockLinker(self, block).run()


@dataclass(frozen=True)
class _Alone:
    """What runs the blocks of a recurrence on this rank: a list of one value for each input."""

    setting: Setting
    functions: dict[str, Function]
    sizes: dict[str, int]

    @property
    def comm(self) -> Any:
        return self.setting.comm or Simulated(1)

    @property
    def dtype(self) -> torch.dtype:
        return self.setting.dtype

    def block(self, block: Block, weights: Any, inputs: list[list[Any]]) -> list[list[Tensor]]:
        sizes = [self.sizes.get(name, 0) for name in self.setting.symbols]  # a step has no seq
        out = self.functions[block.name](*sizes, *(value for (value,) in inputs))
        return [[value] for value in out]

    def with_sizes(self, sizes: dict[str, int]) -> _Alone:
        return replace(self, sizes=sizes)


class _BlockLinker:
    def __init__(self, linker: Linker, block: Block) -> None:
        self.linker = linker
        self.setting = linker.setting
        self.source = block
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.sizes = {name: self.graph.placeholder(name) for name in self.setting.symbols}
        self.made: dict[str, fx.Node] = {}

    def run(self) -> Function:
        for node in self.source.inputs:
            self.env[node] = self.graph.placeholder(f"{identifier(str(node.target))}_in")
        params = {
            name: self.graph.placeholder(f"p{i}_{identifier(name)}")
            for i, name in enumerate(self.source.params)
        }
        for node in self.source.graph.nodes:
            if node.op == "get_attr":
                self.env[node] = params[str(node.target)]
            elif node.op == "call_module":
                self.env[node] = self._call(node, params)
            elif node.op == "call_function":
                self.env[node] = self._function(node)
        self.graph.output(tuple(self.env[node] for node in self.source.results))
        self.graph.eliminate_dead_code()
        return fx.GraphModule({}, self.graph, class_name=self.source.name)

    def _call(self, node: fx.Node, params: dict[str, fx.Node]) -> fx.Node:
        callee = self.linker.block(str(node.target))
        bound = [params[outer] for outer in binding(node).values()]
        args = (*self.sizes.values(), *map(self._value, node.args), *bound)
        new = self.graph.call_function(_named(callee, str(node.target)), args)
        if isinstance(node.meta["type"], tuple):
            return new
        return self.graph.call_function(_first, (new,))

    def _function(self, node: fx.Node) -> fx.Node:
        if node.target in collectives.ALL:
            x, *args = node.args
            run = _collective(self.setting.comm, node.target, tuple(args[:-1]))
            return self.graph.call_function(run, (self._value(x),))
        if node.target is recurrence:
            return self.graph.call_function(self._recurrence(node), self._values(node.args))
        if node.target is associative:
            return self.graph.call_function(self._associative(node), self._values(node.args))
        kwargs = dict(node.kwargs)
        if is_factory(node):
            kwargs["device"] = self.setting.device
        return self.graph.call_function(
            self._on_rank(node.target), self._values(node.args), self._values(kwargs)
        )

    def _recurrence(self, node: fx.Node) -> Function:
        """A recurrence of this rank, of (xs, params, segment_ids)."""
        found: Recurrence = node.kwargs["recurrence"]  # type: ignore[assignment]
        blocks = [b for b in (found.step, found.chunked) if b is not None]
        alone = _Alone(self.setting, {b.name: self.linker.function(b) for b in blocks}, {})

        def run(xs: Any, params: Any, segment_ids: Tensor | None) -> tuple[Tensor, ...]:
            of_rank, shared = ([[t] for t in tensors] for tensors in (xs, params))
            return tuple(y for (y,) in run_recurrence(alone, found, of_rank, shared, segment_ids))

        return _named(run, "recurrence")

    def _associative(self, node: fx.Node) -> Function:
        """A scan of this rank, of (xs,)."""
        block, dim = node.kwargs["combine"].block, node.kwargs["dim"]  # type: ignore[union-attr]
        alone = _Alone(self.setting, {block.name: self.linker.function(block)}, {})

        def run(xs: Any) -> tuple[Tensor, ...]:
            return tuple(y for (y,) in run_associative(alone, block, [[x] for x in xs], dim))  # type: ignore[arg-type]

        return _named(run, "associative_scan")

    def _on_rank(self, target: Any) -> Function:
        """A function, with the rank and its collectives where it asks for them."""
        comm = self.setting.comm
        if target is torch.einsum:  # whose gradients are laid out otherwise
            return einsum_of_letters
        if target in GROUP_FUNCTIONS:
            group = GROUP_FUNCTIONS[target]
            return _named(lambda *args, **kwargs: group(comm, [(args, kwargs)])[0], target.__name__)
        if target in RANK_FUNCTIONS:
            special = RANK_FUNCTIONS[target]
            assert comm is not None
            rank = comm.rank
            return _named(
                lambda *args, **kwargs: special(rank, comm, *args, **kwargs), target.__name__
            )
        return target

    def _values(self, args: Any) -> Any:
        return map_aggregate(args, self._value)

    def _value(self, leaf: Any) -> Any:
        """An argument as it is on this rank."""
        comm = self.setting.comm
        if isinstance(leaf, fx.Node):
            return self.env[leaf]
        if isinstance(leaf, Sym):
            return self._size(leaf)
        if isinstance(leaf, LocalSize):
            return leaf.at(1 if comm is None else comm.size)
        if isinstance(leaf, LocalValues):
            return leaf.at(comm.rank, comm.size) if comm is not None else leaf.values
        return self.setting.dtype if leaf is MODEL_DTYPE else leaf

    def _size(self, size: Sym) -> fx.Node:
        """A size: one of the symbols, or an expression of them, computed once."""
        if size.expr in self.sizes:
            return self.sizes[size.expr]
        if size.expr not in self.made:
            names = list(self.sizes)

            def of(*values: int) -> int:
                return size.at(dict(zip(names, values, strict=True)))

            self.made[size.expr] = self.graph.call_function(
                _named(of, "size"), tuple(self.sizes.values())
            )
        return self.made[size.expr]


def _collective(comm: Processes | None, target: Any, args: tuple) -> Function:
    """A collective of one tensor; among one rank there is nothing to do."""
    if comm is None:
        return _named(lambda x: x, target.__name__)
    return _named(lambda x: comm.run(target, [x], args)[0], target.__name__)


def _watched(block: Block, run: Function) -> Function:
    """A block's function, at whose calls `fm.fit` can look as at those of the user's."""

    def call(*args: Any) -> tuple[Tensor, ...]:
        watch = watching()
        if watch is None or block.function is None:
            return run(*args)
        return watch.around(block.function, args, lambda: run(*args))

    return call


def _first(results: tuple[Tensor, ...]) -> Tensor:
    return results[0]


def _named(fn: Function, name: str) -> Function:
    """A function under a name of its own in the text of a graph."""

    def named(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    named.__name__ = named.__qualname__ = name
    return named
