"""Tables of tensors and what is made of each, as short as they are for one layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import groupby, product

Indices = tuple[int, ...]
Names = dict[str, tuple[Indices, ...]]
Parts = list[tuple[str, tuple[Indices, ...], Names]]
"""Names with stars, the values of the stars, and the names made of it with those of theirs.

In these, `{0}` is what the first star of the name stands for: `("list.*.up", ((0, 1),),
{"list.{0}.up": (), "again*_list.{0}.up": ((1, 2),)})`.
"""


def fold_parts(table: Mapping[str, tuple[str, ...]]) -> Parts:
    """Tensors and what is made of each, in order -> the same with stars for numbers."""
    alike: dict[str, dict[str, list[Indices]]] = {}  # name with stars -> its parts -> indices
    parts: dict[str, Names] = {}
    for name, made in table.items():
        at = tuple(int(part) for part in name.split(".") if _is_number(part))
        folded = _fold(made, at)
        parts[repr(folded)] = folded
        rows = alike.setdefault(_starred(name), {})
        rows.setdefault(repr(folded), []).append(at)
    out: Parts = []
    for name, kinds in alike.items():
        for key, rows in kinds.items():
            columns = _columns(rows)
            if len(rows) > 1 and columns is not None:
                out.append((name, columns, parts[key]))
                continue
            for at in rows:
                named = {part.format(*at): own for part, own in parts[key].items()}
                out.append((_filled(name, at), (), named))
    assert spelled_parts(out) == {name: list(made) for name, made in table.items()}, out
    return out


def spelled_parts(table: Parts) -> dict[str, list[str]]:
    """What `fold_parts` was given."""
    return {
        _filled(name, at): [
            _filled(part.format(*at), index)
            for part, own in parts.items()
            for index in product(*own)
        ]
        for name, indices, parts in table
        for at in product(*indices)
    }


def _is_number(part: str) -> bool:
    """Whether a part of a name is an index, as one writes it."""
    return part.isdecimal() and str(int(part)) == part


def _starred(name: str) -> str:
    return ".".join("*" if _is_number(part) else part for part in name.split("."))


def _filled(name: str, index: Indices) -> str:
    return name.replace("*", "{}").format(*index)


def _columns(rows: list[Indices]) -> tuple[Indices, ...] | None:
    """The values of each index where rows are all of their combinations, in order; else None."""
    columns = tuple(tuple(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    return columns if list(product(*columns)) == rows else None


def _fold(made: tuple[str, ...], at: Indices) -> Names:
    """Names in order, those that differ in their numbers alone as one."""
    out: Names = {}
    for names in _runs(made):
        folded = {_bound(name, at): () for name in names} if len(names) == 1 else _one(names, at)
        if not out.keys().isdisjoint(folded):  # the order would be lost
            return {_bound(name, at): () for name in made}
        out |= folded
    return out


def _runs(made: tuple[str, ...]) -> Iterator[list[str]]:
    for _, names in groupby(made, lambda name: re.sub(r"\d+", "*", name)):
        yield list(names)


def _one(names: list[str], at: Indices) -> Names:
    """A name with a star for the number that differs, and the values of it; else all names."""
    pieces = [re.split(r"(\d+)", name) for name in names]
    differ = [i for i, column in enumerate(zip(*pieces, strict=True)) if len(set(column)) > 1]
    if len(differ) != 1 or not all(_is_number(p[differ[0]]) for p in pieces):
        return {_bound(name, at): () for name in names}
    (where,) = differ
    starred = [*pieces[0][:where], "*", *pieces[0][where + 1 :]]
    return {_bound("".join(starred), at): (tuple(int(p[where]) for p in pieces),)}


def _bound(name: str, at: Indices) -> str:
    """A name with `{0}` for the first index of the tensor that it is made of, and so on."""
    parts, found = name.split("."), 0
    for i, part in enumerate(parts):
        if found < len(at) and part == str(at[found]):
            parts[i] = f"{{{found}}}"
            found += 1
    return ".".join(parts)
