"""One optimiser for some parameters and another for others, by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from funcmodels import tree
from funcmodels.errors import TrainingError, listed
from funcmodels.optim.masks import matches
from funcmodels.optim.optimizer import Optimizer


def partition(parts: Mapping[str, Optimizer]) -> Optimizer:
    """An optimiser for each pattern of paths, in which `*` is anything; the first that matches.

        fm.optim.partition({"embed": fm.optim.frozen(), "*": fm.optim.adamw(1e-4)})

    Its state is a list: the state of each optimiser, in their order, over {path: tensor}.

    Raises:
        TrainingError: a parameter that no pattern matches, when the state is made.
    """
    optimizers = list(dict.fromkeys(parts.values()))
    index_of = {pattern: optimizers.index(optimizer) for pattern, optimizer in parts.items()}

    def index(path: str) -> int:
        for pattern, number in index_of.items():
            if matches(path, pattern):
                return number
        raise TrainingError(
            f"no optimiser for {path}",
            need=f"a pattern that matches it; there are {listed(parts)}",
            fix='partition({..., "*": fm.optim.adamw(...)})',
        )

    def split(values: Any) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = [{} for _ in optimizers]
        for path, value in tree.items(values):
            pieces[index(path)][path] = value
        return pieces

    def init(weights: Any) -> list[Any]:
        return [o.init(part) for o, part in zip(optimizers, split(weights), strict=True)]

    def update(grads: Any, state: Any, weights: Any, *, donate: bool = False) -> tuple[Any, Any]:
        done = [
            optimizer.update(g, s, w, donate=donate)
            for optimizer, g, s, w in zip(
                optimizers, split(grads), state, split(weights), strict=True
            )
        ]
        new = {path: value for part, _ in done for path, value in part.items()}
        return tree.unflatten(weights, new), [s for _, s in done]

    elementwise = all(optimizer.elementwise for optimizer in optimizers)
    asks = all(optimizer.elementwise or optimizer.asks for optimizer in optimizers)
    return Optimizer(init, update, elementwise, asks)


def frozen() -> Optimizer:
    """The optimiser that leaves its parameters as they are, and has no state."""

    def update(grads: Any, state: Any, weights: Any, *, donate: bool = False) -> tuple[Any, Any]:
        return weights, state

    return Optimizer(lambda weights: {}, update)
