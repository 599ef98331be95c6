"""Steps on parts of parameters: what an optimiser asks for that is beyond its process's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from funcmodels import tree
from funcmodels.errors import TrainingError

if TYPE_CHECKING:
    from compiler.torch_target import CompiledModel
    from funcmodels.optim.optimizer import Optimizer


class Parts(Protocol):
    """How the parameters lie on the processes. All of them call each of these."""

    def norm(self, grads: Any) -> Tensor:
        """The 2-norm of gradients, or of some of them, each real element counted once."""
        ...

    def whole(self, path: str, part: Tensor) -> Tensor:
        """What has a parameter's shape, whole, from every process's part."""
        ...

    def part(self, path: str, whole: Tensor) -> Tensor:
        """This process's part of it."""
        ...


_parts: Parts | None = None


def parts() -> Parts | None:
    """How parameters lie in the step at work; None where each is whole."""
    return _parts


@contextmanager
def held_in(parts: Parts) -> Iterator[None]:
    """Tell the optimisers that step inside how the parameters lie."""
    global _parts
    before, _parts = _parts, parts
    try:
        yield
    finally:
        _parts = before


def sharded(optimizer: Optimizer, module: CompiledModel) -> Optimizer:
    """An optimiser of the parameters that this process holds on a mesh; `fm.fit` makes it itself.

    Clipping then takes the norm of all gradients, and Muon gathers a matrix, orthogonalises it and
    keeps this process's part; every process must take the step. Others need no such thing, and are
    what they are.

    Args:
        optimizer: of this folder's; or one of your own that is `elementwise`.
        module: of `fm.compile_to_torch(model, mesh)`.
    Raises:
        TrainingError: the optimiser looks beyond an element, and does not ask for it.
    """
    placements = module.placements().items()
    cut = [path for path, at in placements if tuple(at.size) != tuple(at.shape)]
    if optimizer.elementwise or not cut:
        return optimizer
    if not optimizer.asks:
        raise TrainingError(
            "this optimiser needs whole parameters, and each process holds a part of them",
            got=f"an optimiser, or a transform in a chain, of your own, and {cut[0]} in parts",
            need="an optimiser in which an element's step depends on that element alone, or one "
            "of fm.optim",
            fix="elementwise=True where that is so; fm.optim.clip_by_global_norm clips",
        )
    at = OfModule(module)

    def update(grads: Any, state: Any, weights: Any, *, donate: bool = False) -> tuple[Any, Any]:
        with held_in(at):
            return optimizer.update(grads, state, weights, donate=donate)

    return type(optimizer)(optimizer.init, update)


class OfModule:
    """The parts of a compiled model's parameters."""

    def __init__(self, module: CompiledModel) -> None:
        assert module.layout is not None
        self.layout = module.layout
        self.holders = holders(module)

    def norm(self, grads: Any) -> Tensor:
        return sum_of_squares(grads, self.holders).sqrt()

    def whole(self, path: str, part: Tensor) -> Tensor:
        return self.layout.whole(path, part)

    def part(self, path: str, whole: Tensor) -> Tensor:
        return self.layout.local(path, whole)


def holders(module: CompiledModel) -> dict[str, int]:
    """How many processes hold the part of each parameter that this one holds."""
    own = {path: tuple(place.offset) for path, place in module.placements().items()}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return {path: sum(other[path] == at for other in every) for path, at in own.items()}


def sum_of_squares(grads: Any, holders: dict[str, int], more: Tensor | float = 0.0) -> Tensor:
    """Of the gradients of all processes, () float64, and `more` of each."""
    squares = [
        leaf.detach().to(torch.float64).square().sum() / holders[path]
        for path, leaf in tree.items(grads)
    ]
    total = torch.stack(squares).sum() + more
    dist.all_reduce(total)
    return total
