"""Masks: which parameters something is for, told by path, as `layers.0.attn.q`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from funcmodels import tree
from funcmodels.errors import TrainingError, listed

Mask: TypeAlias = Callable[[str, Tensor], bool]


def matching(*patterns: str) -> Mask:
    """The parameters whose path matches one of the patterns, in which `*` is anything.

    >>> matching("layers.*.attn.*")("layers.0.attn.q", None)
    True

    An optimiser's `init` refuses one of which no pattern matches any parameter.
    """
    return Matching(patterns)


def not_matching(*patterns: str) -> Mask:
    """The parameters whose path matches none of them: `not_matching("*norm*", "*bias*")`."""
    return Matching(patterns, negated=True)


@dataclass(frozen=True)
class Matching:
    """A mask that knows its patterns."""

    patterns: tuple[str, ...]
    negated: bool = False

    def __call__(self, path: str, weight: Any) -> bool:
        found = any(matches(path, pattern) for pattern in self.patterns)
        return found != self.negated

    def check(self, paths: list[str]) -> None:
        """Refuse it where it says nothing of these parameters.

        Raises:
            TrainingError: no pattern matches one.
        """
        if not any(matches(path, pattern) for pattern in self.patterns for path in paths):
            name = "not_matching" if self.negated else "matching"
            refuse_unmatched(f"fm.optim.{name}", self.patterns, paths)


def check_mask(mask: Any) -> None:
    """A mask is a function.

    Raises:
        TrainingError: it is something else, as a pattern, or a tree of booleans.
    """
    if mask is not None and not callable(mask):
        raise TrainingError(
            "decay is no mask",
            got=repr(mask) if isinstance(mask, str) else type(mask).__name__,
            need="a function (path, weight) -> bool, as of fm.optim.matching",
            fix=f"decay=fm.optim.matching({mask!r})"
            if isinstance(mask, str)
            else "decay=lambda path, weight: weight.ndim > 1",
        )


_whole: list[str] | None = None


@contextmanager
def part_of(weights: Any) -> Iterator[None]:
    """Tell optimisers that are made for a part of the parameters which ones there are in all."""
    global _whole
    before, _whole = _whole, all_paths(weights)
    try:
        yield
    finally:
        _whole = before


def all_paths(weights: Any) -> list[str]:
    """The paths of weights, and of those that they are a part of."""
    return [path for path, _ in tree.items(weights)] if _whole is None else _whole


def refuse_unmatched(what: str, patterns: Sequence[str], paths: list[str]) -> NoReturn:
    """Patterns match no parameter: name the path that was perhaps meant."""
    raise TrainingError(
        f"{what}: no parameter matches",
        got=listed(map(repr, patterns)),
        need=f"a pattern of paths as {listed(paths)}",
        fix=_nearest(patterns, paths),
    )


def _nearest(patterns: Sequence[str], paths: list[str]) -> str:
    """The pattern with its most similar name in place of one that does not exist."""
    names = sorted({name for path in paths for name in path.split(".")})
    for pattern in patterns:
        for word in filter(None, re.split(r"[.*?]", pattern)):
            near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
            if near and near[0] != word:
                return repr(pattern.replace(word, near[0]))
    return f"{paths[-1]!r}, or '*' for all" if paths else "weights that have parameters"


@torch.compiler.assume_constant_result
def matches(path: str, pattern: str) -> bool:
    """Whether a path matches a pattern; while compiling, a constant of the step."""
    return fnmatchcase(path, pattern)
