"""Paths, mapping and flattening of parameter pytrees: dicts, lists, tuples, registered dataclasses.

These are torch's own pytrees, the ones `torch.func` takes gradients over; this file adds only the
path of a leaf as people write it, `layers.0.attn.q`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import _pytree as pytree

Tree = Any
Structure = pytree.TreeSpec


def dataclass(cls: type) -> type:
    """Make a frozen dataclass a pytree: `@fm.tree.dataclass class Layer: ...`."""
    cls = cls if dataclasses.is_dataclass(cls) else dataclasses.dataclass(frozen=True)(cls)
    pytree.register_dataclass(cls)
    return cls


def leaves(tree: Tree) -> list[Any]:
    """The leaves of a tree, in its order."""
    return pytree.tree_leaves(tree)


def structure(tree: Tree) -> Structure:
    """What a tree is without its leaves."""
    return pytree.tree_structure(tree)


def items(tree: Tree) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every leaf, in the tree's order: ("layers.0.attn.q", leaf)."""
    for keys, leaf in pytree.tree_flatten_with_path(tree)[0]:
        yield path_of(keys), leaf


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """A tree of the same structure, with fn applied to each leaf (and those of `rest`)."""
    return pytree.tree_map(fn, tree, *rest)


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """As `map`, with the path of the leaf as the first argument of fn."""
    return pytree.tree_map_with_path(lambda keys, *xs: fn(path_of(keys), *xs), tree, *rest)


def unflatten(like: Tree, values: dict[str, Any]) -> Tree:
    """A tree of the structure of `like`, whose leaves are looked up by path."""
    return map_with_path(lambda path, _: values[path], like)


def path_of(keys: tuple[Any, ...]) -> str:
    """torch's key path as dotted text."""
    return ".".join(str(_name(key)) for key in keys)


def _name(key: Any) -> Any:
    """The dict key, list index or field name that a torch key entry holds."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    raise TypeError(f"unknown pytree key {key!r}")
