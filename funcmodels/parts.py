"""Parameters that share one tensor of a checkpoint: `heads[0:32/96]` in a layout.

Of every 96 rows of that axis, those from 0 to 32 are this parameter's. So three parameters lie one
after another, `heads[0:32/96]`, or in turns, head by head: `heads[0:1/3]`, `heads[1:2/3]`, ...
Parts of which no axis is a common measure are counted in rows, `(heads head_dim)[0:2048/6144]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from funcmodels.errors import DeclarationError

if TYPE_CHECKING:
    from funcmodels.weightmap import TensorMap

_PART = re.compile(r"(\w+|\([\w ]+\))\[(\d+):(\d+)/(\d+)\]")


@dataclass(frozen=True)
class Part:
    """Which rows of a tensor are a parameter's: of every `period` units those of [start, stop).

    Args:
        dim: of the tensor, along which its parameters lie.
        unit: rows of one unit of the axis, as the features of a head.
    """

    start: int
    stop: int
    period: int
    dim: int
    unit: int

    @property
    def width(self) -> int:
        return self.stop - self.start

    def view(self, whole: Tensor) -> Tensor:
        """The parameter's rows in the tensor: (..., turns, width, unit, ...), a view."""
        turns = whole.unflatten(self.dim, (-1, self.period, self.unit))
        return turns.narrow(self.dim + 1, self.start, self.width)

    def cut(self, whole: Tensor) -> Tensor:
        """The parameter's rows of a tensor, in the tensor's layout."""
        return self.view(whole).flatten(self.dim, self.dim + 2)

    def put(self, whole: Tensor, rows: Tensor) -> None:
        """Write the parameter's rows into a tensor."""
        place = self.view(whole)
        place.copy_(rows.unflatten(self.dim, (-1, self.width, self.unit)))

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor of which the parameter has rows of this shape."""
        rows = shape[self.dim] // self.width * self.period
        return (*shape[: self.dim], rows, *shape[self.dim + 1 :])


def without_parts(layout: str) -> str:
    """The layout of the parameter's own rows: `(heads[0:1/3] head_dim)` -> `(heads head_dim)`."""
    return _PART.sub(r"\1", layout)


def part_of(layout: str, sizes: Mapping[str, int], path: str, where: object) -> Part | None:
    """The part that a layout speaks of, None for the whole tensor.

    Raises:
        DeclarationError: two parts, bounds that are none, or an axis of another size.
    """
    found = _PART.findall(layout)
    if not found:
        return None
    axis, start, stop, period = found[0][0], *map(int, found[0][1:])
    width, own = stop - start, axis.strip("()").split()
    size = prod(sizes.get(a, width) for a in own)
    if len(found) > 1 or not 0 <= start < stop <= period or size % width:
        raise DeclarationError(
            f"the layout of {path} takes no part of a tensor",
            got=f"{layout}, with {axis}={size}",
            need="one axis[start:stop/period], start < stop <= period, and stop - start divides "
            "the axis",
            from_=where,
            fix=f"{axis}[0:{size}/{period}] for the first rows of {period}",
        )
    groups = re.findall(r"\(([^)]*)\)|(\w+)", without_parts(layout))
    dims = [(group or single).split() for group, single in groups]
    dim = next(i for i, axes in enumerate(dims) if own[-1] in axes)
    after = dims[dim][dims[dim].index(own[-1]) + 1 :]
    return Part(start, stop, period, dim, prod(sizes[a] for a in after if a != "1"))


def check_shared(name: str, sharing: Mapping[str, TensorMap], where: object) -> None:
    """The parameters of one tensor are all of it, and none is another's.

    Raises:
        DeclarationError: they overlap, leave rows out, or lie along different dims.
    """
    parts = {path: map_.part for path, map_ in sharing.items()}
    shapes = {map_.tensor_shape() for map_ in sharing.values()}
    kinds = {p and (p.period, p.dim, p.unit) for p in parts.values()}
    ranges = sorted((p.start, p.stop) for p in parts.values() if p is not None)
    ends = [0, *(stop for _, stop in ranges)]
    period = next(iter(parts.values())).period  # type: ignore[union-attr]
    if (
        len(shapes) == len(kinds) == 1
        and [start for start, _ in ranges] == ends[:-1]
        and ends[-1] == period
    ):
        return
    raise DeclarationError(
        f'the parameters stored in "{name}" are not all of it, each row once',
        got="; ".join(f"{path}: {m.written} of {m.tensor_shape()}" for path, m in sharing.items()),
        need="parts of one dim that follow each other from 0 to the number after the slash",
        from_=where,
        fix="[0:a/c] and [a:c/c] for two parameters of a and c - a rows",
    )


def stored_tensors_of(
    maps: Mapping[str, TensorMap], values: Mapping[str, Tensor], names: set[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors of parameters, by name: those that share one are put together.

    Args:
        maps, values: by path. Parts of different dtypes are promoted.
        names: the tensors that are asked for; None for all.
    """
    owners: dict[str, list[str]] = {}
    for path, map_ in maps.items():
        for name in map_.names:
            if names is None or name in names:
                owners.setdefault(name, []).append(path)
    begun: dict[str, Tensor] = {}
    for path, map_ in maps.items():
        if not any(name in owners for name in map_.names):
            continue
        for name, rows in zip(map_.names, map_.from_param(values[path].detach()), strict=True):
            if name not in owners:
                continue
            if map_.part is None:
                yield name, rows
                continue
            if name not in begun:
                dtype = reduce(torch.promote_types, (values[p].dtype for p in owners[name]))
                begun[name] = rows.new_empty(map_.tensor_shape(), dtype=dtype)
            map_.part.put(begun[name], rows)
            if path == owners[name][-1]:
                yield name, begun.pop(name)
