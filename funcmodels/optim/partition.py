"""One optimiser for some parameters and another for others, by path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from funcmodels import tree
from funcmodels.errors import TrainingError, listed
from funcmodels.optim.arguments import check_optimizer
from funcmodels.optim.masks import all_paths, matches, part_of, refuse_unmatched
from funcmodels.optim.optimizer import Optimizer


def partition(parts: Mapping[str, Optimizer]) -> Optimizer:
    """An optimiser for each pattern of paths, in which `*` is anything; the first that matches.

        fm.optim.partition({"embed": fm.optim.frozen(), "*": fm.optim.adamw(1e-4)})

    Its state is a list: the state of each optimiser, in their order, over {path: tensor}.

    Raises:
        TrainingError: a value that is no optimiser; when the state is made, a parameter that no
            pattern matches, or a pattern but "*" that is the first to match of none.
    """
    for pattern, optimizer in parts.items():
        check_optimizer(f"partition: {pattern!r}", optimizer)
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
        _check(parts, all_paths(weights))
        with part_of(weights):
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


def _check(patterns: Iterable[str], paths: list[str]) -> None:
    """Each pattern is the first to match for some parameter."""
    left = list(paths)
    for pattern in patterns:
        found = [path for path in left if matches(path, pattern)]
        if not found and pattern != "*":
            if taken := [path for path in paths if matches(path, pattern)]:
                raise TrainingError(
                    f"partition: patterns before {pattern!r} match all that it matches",
                    got=listed(taken),
                    need="a pattern that is the first to match of some parameter",
                    fix=f"{pattern!r} in front of them",
                )
            refuse_unmatched("fm.optim.partition", [pattern], paths)
        left = [path for path in left if path not in found]


def frozen() -> Optimizer:
    """The optimiser that leaves its parameters as they are, and has no state."""

    def update(grads: Any, state: Any, weights: Any, *, donate: bool = False) -> tuple[Any, Any]:
        return weights, state

    return Optimizer(lambda weights: {}, update)
