"""Dotted names: of modules, of a checkpoint's tensors, and the paths of parameters."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from compiler.names import identifier


def fused_name(leaves: list[str]) -> str:
    """`q_proj k_proj v_proj` as `qkv_proj`, `gate_proj up_proj` as `gate_up_proj`."""
    if len(leaves) == 1:
        return leaves[0]
    tail = "".join(shared([leaf[::-1] for leaf in leaves]))[::-1]
    tail = tail[tail.index("_") :] if "_" in tail else ""
    stems = [leaf[: len(leaf) - len(tail)] if tail else leaf for leaf in leaves]
    return ("" if all(len(s) == 1 for s in stems) else "_").join(stems) + tail


def attribute(path: str, in_list: bool) -> str:
    """A path as Python can write it: `parts._0.q` for `parts.0.q`, but `layers.0` of a list."""
    *parents, last = path.split(".")
    index = in_list and bool(parents) and last.isdigit()
    return ".".join([*map(identifier, parents), last if index else identifier(last)])


def module(tensor: str) -> str:
    """The module that a tensor's name speaks of; one not named as a module's is its own."""
    return tensor.removesuffix(".weight").removesuffix(".bias")


def parent(name: str) -> str:
    return name.rpartition(".")[0]


def join(*parts: str) -> str:
    return ".".join(filter(None, parts))


def below(name: str, anchor: str) -> str | None:
    """`name` seen from `anchor`, or None where it does not lie below it."""
    if not anchor:
        return name
    return name[len(anchor) + 1 :] if name.startswith(f"{anchor}.") else None


def of_one_element(paths: list[str]) -> list[str]:
    """Of the paths of a layer's parameters and some more, those of the layer: of most of them."""
    elements = Counter(tuple(p.split(".")[:2]) for p in paths if re.match(r"\w+\.\d+(\.|$)", p))
    most = [e for e, n in elements.items() if n == max(elements.values())]
    return [p for p in paths if tuple(p.split(".")[:2]) in most] if len(most) == 1 else paths


def around(place: str) -> list[str]:
    """A place and those that it lies in."""
    return [place, *itertools.accumulate(place.split(".")[:-1], join)]


def lists(calls: Collection[str], layers: Iterable[str]) -> set[str]:
    """The places that are module lists: calls are all that lies in them, from 0 on."""
    found: dict[str, set[str]] = {}
    for attr in calls:
        found.setdefault(parent(attr), set()).add(attr)
    placed = [*calls, *layers]
    return {
        place
        for place, attrs in found.items()
        if place
        and attrs == {f"{place}.{i}" for i in range(len(attrs))}
        and {a for a in placed if a.startswith(f"{place}.")} == attrs
    }


def common(names: list[str]) -> str:
    """The longest dotted prefix that names share."""
    if not names:
        return ""
    return ".".join(shared([name.split(".") for name in names]))


def shared(sequences: Sequence[Sequence[str]]) -> list[str]:
    """The elements that sequences begin with in common."""
    found = []
    for elements in zip(*sequences, strict=False):
        if len(set(elements)) > 1:
            break
        found.append(elements[0])
    return found


def at_index(place: str, path: str) -> str | None:
    """The part of a place up to the list index of a path: `model.layers.3` for `layers.3...`."""
    index = next((part for part in path.split(".") if part.isdigit()), None)
    parts = place.split(".")
    if index is None:
        return place
    return ".".join(parts[: parts.index(index) + 1]) if index in parts else None
