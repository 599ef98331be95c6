"""The reversible map between parameters and the tensors of a checkpoint, from one pattern.

`"name: pattern"` names the tensor and its layout in terms of the parameter's axes:

    model.layers.{layers}.self_attn.q_proj.weight: (heads head_dim) hidden

Braces are an index: of the enclosing list with that key, or over an axis of the parameter, which
is then spread over several tensors (`experts.{experts}.w1.weight`). Several parameters share a
tensor as parts of one dim, see `funcmodels.parts`:

    model.layers.{layers}.self_attn.qkv_proj.weight: (heads[0:32/48] head_dim) hidden
    model.layers.{layers}.conv1d.weight: (heads head_dim)[0:2048/8192] 1 width

A `1` is a dim of one element, as a convolution's weight of each channel has: `channels 1 width`.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from funcmodels.errors import DeclarationError, listed
from funcmodels.parts import Part, part_of, without_parts

_BRACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class TensorMap:
    """How one parameter is laid out in a checkpoint.

    Args:
        names: the checkpoint's tensor names, in row-major order of the spread axes; usually one.
        axes: the parameter's axes in order.
        spread: those of them that are spread over several tensors.
        layout: einops pattern of one tensor, without the spread axes.
        sizes: axis -> size.
        part: which rows of the tensor are the parameter's, where it shares it with others; `layout`
            is then that of its own rows.
    """

    names: tuple[str, ...]
    axes: tuple[str, ...]
    spread: tuple[str, ...]
    layout: str
    sizes: tuple[tuple[str, int], ...]
    part: Part | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the checkpoint's one tensor is the parameter itself."""
        return not self.spread and not self.part and self.layout.split() == list(self.axes)

    @property
    def written(self) -> str:
        """The layout for messages, with the rows that are the parameter's."""
        if self.part is None:
            return self.layout
        rows = f"rows {self.part.start}:{self.part.stop} of every {self.part.period}"
        return f"{self.layout}, {rows}" + (f" times {self.part.unit}" if self.part.unit > 1 else "")

    def tensor_shape(self) -> tuple[int, ...]:
        """The shape that each tensor has in the checkpoint."""
        shape = _layout_shape(self.layout, self.sizes)
        return shape if self.part is None else self.part.shape(shape)

    def to_param(self, tensors: list[Tensor]) -> Tensor:
        """The parameter, from the checkpoint's tensors in the order of `names`."""
        if self.is_identity:
            return tensors[0]
        if self.part is not None:
            tensors = [self.part.cut(t) for t in tensors]
        one = " ".join(axis for axis in self.axes if axis not in self.spread)
        sizes = {a: n for a, n in self.sizes if a not in self.spread}
        parts = [rearrange(t, f"{self.layout} -> {one}", **sizes) for t in tensors]
        if not self.spread:
            return parts[0]
        spread = " ".join(self.spread)
        sizes = {a: n for a, n in self.sizes if a in self.spread}
        return rearrange(torch.stack(parts), f"({spread}) {one} -> {' '.join(self.axes)}", **sizes)

    def fill(self, value: Tensor, index: int, tensor: Tensor) -> None:
        """Write the checkpoint's tensor `names[index]` into its place in the parameter.

        Casts to the parameter's dtype and moves to its device; needs no memory of its own.
        """
        one = [axis for axis in self.axes if axis not in self.spread]
        place = value.permute([self.axes.index(axis) for axis in (*self.spread, *one)])
        at = itertools.product(*(range(n) for n in place.shape[: len(self.spread)]))
        sizes = {a: n for a, n in self.sizes if a in one}
        tensor = tensor if self.part is None else self.part.cut(tensor)
        part = rearrange(tensor, f"{self.layout} -> {' '.join(one)}", **sizes)
        place[next(itertools.islice(at, index, None))].copy_(part)

    def from_param(self, value: Tensor) -> list[Tensor]:
        """The checkpoint's tensors, in the order of `names`: the inverse of `to_param`.

        Of a tensor that is shared, its own rows: `stored_tensors_of` puts them together.
        """
        if not self.spread and self.layout.split() == list(self.axes):
            return [value]
        spread = " ".join(self.spread)
        flat = rearrange(value, f"{' '.join(self.axes)} -> ({spread}) {self.layout}")
        return list(flat.unbind(0))


def tensor_map(
    hf: str | None, path: str, axes: tuple[str, ...], shape: tuple[int, ...], where: object
) -> TensorMap:
    """The map that a parameter's `hf` text and its path declare.

    Raises:
        DeclarationError: a brace that is neither an enclosing list nor an axis, or a layout that
            does not use each remaining axis exactly once.
    """
    template, layout = _split(hf, path, axes)
    spread, lists = _braces(template, path, axes, where)
    left = tuple(axis for axis in axes if axis not in spread)
    layout = layout or " ".join(left)
    sizes = dict(zip(axes, shape, strict=True))
    part = part_of(layout, sizes, path, where)
    layout = without_parts(layout)
    _check_layout(layout, left, path, where)
    name = _BRACE.sub(lambda m: lists.get(m[1], m[0]), template)
    names = [name]
    if spread:
        ranges = (range(sizes[axis]) for axis in spread)
        names = [_indexed(name, spread, index) for index in itertools.product(*ranges)]
    return TensorMap(tuple(names), axes, spread, layout, tuple(sizes.items()), part)


def _indexed(name: str, spread: tuple[str, ...], index: tuple[int, ...]) -> str:
    """The name with an index for each brace: `experts.{experts}.w1` at (3,) -> `experts.3.w1`."""
    at = dict(zip(spread, index, strict=True))
    return _BRACE.sub(lambda match: str(at[match[1]]), name)


def _split(hf: str | None, path: str, axes: tuple[str, ...]) -> tuple[str, str]:
    """Template and layout of an `hf` text; without one a tensor is named by its path."""
    if hf is None:
        return path, ""
    template, _, layout = hf.partition(":")
    return template.strip(), layout.strip()


@functools.lru_cache(maxsize=65536)
def _lists_of(path: str) -> dict[str, str]:
    """Index of each enclosing list, by the list's key: `layers.3.attn.q` -> {"layers": "3"}."""
    parts = path.split(".")
    return {
        key: index
        for key, index in itertools.pairwise(parts)
        if index.isdigit() and not key.isdigit()
    }


def _braces(
    template: str, path: str, axes: tuple[str, ...], where: object
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The axes that the template spreads, and the list indices that it takes from the path."""
    found = _BRACE.findall(template)
    lists = _lists_of(path)
    spread = tuple(axis for axis in axes if axis in found and axis not in lists)
    if unknown := [b for b in found if b not in lists and b not in axes]:
        raise DeclarationError(
            f'"{{{unknown[0]}}}" in the tensor name of {path} is no list and no axis',
            got=template,
            need=f"one of the lists {listed(lists)} or the axes {listed(axes)}",
            from_=where,
            fix=f"write {{{next(iter(lists), axes[0] if axes else 'layers')}}}, or drop the braces",
        )
    return spread, lists


@functools.lru_cache(maxsize=4096)
def _layout_axes(layout: str) -> tuple[str, ...]:
    """The axis names of an einops pattern, in order."""
    return tuple(axis for axis in re.findall(r"\w+", layout) if axis != "1")


@functools.lru_cache(maxsize=4096)
def _layout_shape(layout: str, sizes: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    """The shape of an einops pattern, with each group's sizes multiplied."""
    size = {"1": 1, **dict(sizes)}
    groups = re.findall(r"\(([^)]*)\)|(\w+)", layout)
    shape = []
    for group, single in groups:
        n = 1
        for axis in group.split() or ([single] if single else []):
            n *= size[axis]
        shape.append(n)
    return tuple(shape)


def _check_layout(layout: str, left: tuple[str, ...], path: str, where: object) -> None:
    """Each axis once: then the map is a bijection, and its round trip is exact."""
    used = _layout_axes(layout)
    if used == left or sorted(used) == sorted(left):
        return
    raise DeclarationError(
        f"the checkpoint layout of {path} does not use each axis exactly once",
        got=layout,
        need=" ".join(left) or "nothing: every axis is spread over tensors",
        from_=where,
        fix="name each axis of the parameter once; group with parentheses, e.g. (heads head_dim)",
    )
