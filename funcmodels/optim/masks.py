"""Masks: which parameters something is for, told by path, as `layers.0.attn.q`."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor

Mask: TypeAlias = Callable[[str, Tensor], bool]


def matching(*patterns: str) -> Mask:
    """The parameters whose path matches one of the patterns, in which `*` is anything.

    >>> matching("layers.*.attn.*")("layers.0.attn.q", None)
    True
    """
    return lambda path, _: any(matches(path, pattern) for pattern in patterns)


def not_matching(*patterns: str) -> Mask:
    """The parameters whose path matches none of them: `not_matching("*norm*", "*bias*")`."""
    chosen = matching(*patterns)
    return lambda path, weight: not chosen(path, weight)


@torch.compiler.assume_constant_result
def matches(path: str, pattern: str) -> bool:
    """Whether a path matches a pattern; while compiling, a constant of the step."""
    return fnmatchcase(path, pattern)
