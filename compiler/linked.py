"""A program as it runs on one process: its parts one after the other, each linked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from compiler.comm import Processes
from compiler.fsdp import Gather, Run, Unit
from compiler.ir import Program, tensor_type
from compiler.link import Linker, Setting
from compiler.mesh import Layout
from compiler.parts import Part, parts_of
from compiler.reduce import landed
from funcmodels.finite import watching
from funcmodels.remat import remat


@dataclass(eq=False)
class Step:
    """One part as it runs: which values it takes and makes, by their slots, and its parameters.

    `recomputed`: whether a backward pass computes its values again.
    """

    fn: Callable[..., tuple[Tensor, ...]]
    inputs: list[int]
    results: list[int]  # -1 where nothing reads one
    paths: list[str]
    recomputed: bool = False
    done_with: list[int] = field(default_factory=list)
    unit: Unit | None = None
    ahead: list[str] = field(default_factory=list)  # the parameters of the next unit


class Linked:
    """A program for one kind of inputs.

    Args:
        program: traced, and partitioned where there are tp ranks.
        layout: which part of each parameter this process holds.
        dtype: of the weights that declare none of their own.
        device: of the tokens.
    """

    def __init__(
        self, program: Program, layout: Layout, dtype: torch.dtype, device: torch.device
    ) -> None:
        batched = len(tensor_type(program.root.inputs[0]).shape) == 2
        symbols = ("batch", "seq") if batched else ("num_tokens",)
        linker = Linker(program, Setting(symbols, dtype, device, layout.ranks.tp))
        self.fsdp = layout.ranks.fsdp
        self.slots = {node: i for i, node in enumerate(program.root.inputs)}
        self.steps = [self._step(linker, part) for part in parts_of(program)]
        (result,) = program.root.results
        self.result = self.slots[result]
        self._drop_after_use()
        if self.fsdp is not None:
            self._make_units(self.fsdp, layout)

    def _step(self, linker: Linker, part: Part) -> Step:
        if not part.is_call:
            fn = linker.function(part.block)
        elif self.fsdp is not None:  # what is computed again is the unit, its gather included
            fn = linker.kept(part.block.name)
        else:
            fn = linker.block(part.block.name)
        inputs = [self.slots[node] for node in part.inputs]
        for node in part.results:
            if node is not None:
                self.slots[node] = len(self.slots)
        results = [-1 if node is None else self.slots[node] for node in part.results]
        paths = [part.params[name] for name in part.block.params]
        return Step(_telling(fn, paths), inputs, results, paths, recomputed=part.block.remat)

    def _drop_after_use(self) -> None:
        """Say after which step each value is needed no more."""
        seen = {self.result}
        for step in reversed(self.steps):
            step.done_with = sorted(set(step.inputs) - seen)
            seen.update(step.inputs)

    def _make_units(self, comm: Processes, layout: Layout) -> None:
        """Let each step that has parameters gather them, and start the gather of the next one."""
        used = Counter(path for step in self.steps for path in set(step.paths))
        following: Step | None = None
        for step in reversed(self.steps):
            if not step.paths:
                if step.recomputed:
                    step.fn = remat(step.fn)
                continue
            paths = list(dict.fromkeys(step.paths))
            fn, step.paths = _each_once(step.fn, step.paths, paths), paths
            cuts = [layout.cuts.get(path) for path in paths]
            # The sum of two gradients that are on their way would be a sum of nothing.
            gather = Gather(comm, cuts, [used[path] == 1 for path in paths])
            after = following.unit if following else None
            step.unit = Unit(fn, gather, after, recomputed=step.recomputed)
            step.ahead = following.paths if following else []
            following = step

    def __call__(self, weights: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
        """The logits.

        Args:
            weights: this process's parameters by path.
            inputs: tokens, positions and, for a program traced with them, segment ids.
        """
        values: list[Any] = [*inputs, *[None] * (len(self.slots) - len(inputs))]
        if self.fsdp is not None and torch.is_grad_enabled():
            weights = landed(self.fsdp, weights)
        self._run(self.steps, tuple(inputs[0].shape), weights, values)
        return values[self.result]

    def part(
        self,
        steps: slice,
        sizes: tuple[int, ...],
        weights: dict[str, Tensor],
        given: dict[fx.Node, Tensor],
        wanted: list[fx.Node],
    ) -> list[Tensor]:
        """Some values of the program's root, by some of its steps, from others that are given."""
        values: list[Any] = [None] * len(self.slots)
        for node, value in given.items():
            values[self.slots[node]] = value
        self._run(self.steps[steps], sizes, weights, values)
        return [values[self.slots[node]] for node in wanted]

    def _run(
        self,
        steps: list[Step],
        sizes: tuple[int, ...],
        weights: dict[str, Tensor],
        values: list[Any],
    ) -> None:
        run = Run()
        for step in steps:
            given = [values[i] for i in step.inputs]
            own = [weights[path] for path in step.paths]
            if step.unit is None:
                results = step.fn(*sizes, *given, *own)
            else:
                results = step.unit(run, sizes, given, own, [weights[p] for p in step.ahead])
            for i, value in zip(step.results, results, strict=True):
                if i >= 0:
                    values[i] = value
            for i in step.done_with:
                values[i] = None


def _telling(fn: Callable[..., Any], paths: list[str]) -> Callable[..., tuple[Tensor, ...]]:
    """A part that says which parameters it was given, to what looks at it for `fm.fit`."""

    def of(*args: Any) -> tuple[Tensor, ...]:
        watch = watching()
        if watch is not None:
            params = args[len(args) - len(paths) :]
            watch.paths = dict(zip(map(id, params), paths, strict=True))
        return fn(*args)

    return of


def _each_once(
    fn: Callable[..., Any], given: list[str], paths: list[str]
) -> Callable[..., tuple[Tensor, ...]]:
    """A function of parameters in which each comes once, for one that may take one twice."""
    if given == paths:
        return fn
    at = [paths.index(path) for path in given]

    def of(*args: Any) -> tuple[Tensor, ...]:
        rest, params = args[: -len(paths)], args[-len(paths) :]
        return fn(*rest, *[params[i] for i in at])

    return of
