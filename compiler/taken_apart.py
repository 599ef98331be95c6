"""A served model's parameters, where they are parts and copies of those that a user declared."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from compiler.shared_tensors import Shared, set_apart
from funcmodels import tree
from funcmodels.sharding import PartitionSpec
from funcmodels.spec import Model, Param
from funcmodels.weightmap import TensorMap, tensor_map


@dataclass(frozen=True, eq=False)
class TakenApart(Model):
    """A model whose parameters are those of another one, by path, some of them taken apart.

    Args:
        elements: path -> the paths of its elements, in order.
        copies: path, there or among the elements -> the paths of its copies.
        split, repeated: the same of the checkpoint's tensors, by name.
        shared: tensors of the checkpoint that are several parameters.
    """

    elements: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    copies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    repeated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared: Mapping[str, Shared] = field(default_factory=dict)

    def of(self, weights: Any) -> dict[str, Tensor]:
        """The weights of the model that this one was made from, as this one has them."""
        values = dict(tree.items(weights))
        if self.by_path.keys() <= values.keys():
            return {path: values[path] for path in self.by_path}
        for path, names in self.elements.items():
            values.update(zip(names, values.pop(path).unbind(0), strict=True))
        for path, names in self.copies.items():
            values.update(dict.fromkeys(names, values[path]))
        return {path: values[path] for path in self.by_path}


class Made:
    """The parameters of the new model, and of what they were made."""

    def __init__(self, model: Model) -> None:
        self.source = model
        self.params, self.shared = set_apart(model)
        self.elements: dict[str, tuple[str, ...]] = {}
        self.copies: dict[str, tuple[str, ...]] = {}
        self.split: dict[str, tuple[str, ...]] = {}
        self.repeated: dict[str, tuple[str, ...]] = {}

    def model(self) -> TakenApart:
        given = {f.name: getattr(self.source, f.name) for f in fields(Model)}
        given["params"] = self.params
        return TakenApart(
            **given,
            elements=self.elements,
            copies=self.copies,
            split=self.split,
            repeated=self.repeated,
            shared=self.shared,
        )

    def map_of(self, path: str) -> TensorMap:
        param = self.params[path]
        return tensor_map(param.hf, path, param.axes, param.shape, param.where)

    def take_elements(self, path: str) -> list[str]:
        """Parameters for the elements of one; their paths."""
        param, map_ = self.params[path], self.map_of(path)
        del self.params[path]
        axis = param.axes[0]
        template, _, layout = (param.hf or path).partition(":")
        spread = axis in map_.spread
        names = [with_index(path, path, i) for i in range(param.shape[0])]
        for i, name in enumerate(names):
            if spread:
                tensor = template.strip().replace(f"{{{axis}}}", str(i))
            else:
                tensor = with_index(template.strip(), path, i)
            stored = layout if spread else layout.strip().removeprefix(axis)
            self.params[name] = element_of(param, f"{tensor}:{stored}")
        self.elements[path] = tuple(names)
        if not spread:
            made = [with_index(map_.names[0], path, i) for i in range(len(names))]
            self.split[map_.names[0]] = tuple(made)
        return names

    def copy(self, path: str, names: list[str]) -> None:
        """Parameters of these paths for one, of which the first may be its own."""
        param = self.params.pop(path)
        template, _, layout = (param.hf or path).partition(":")
        parts = path.split(".")
        listed = {k: i for k, i in itertools.pairwise(parts) if i.isdigit()}
        filled = template.strip()
        for key, index in listed.items():
            filled = filled.replace(f"{{{key}}}", index)
        tensors = []
        for j, name in enumerate(names):
            own = filled if name == path else _copied(filled, path, name, j)
            self.params[name] = replace(param, hf=f"{own}:{layout}")
            tensors.append(own)
        self.copies[path] = tuple(names)
        for braces in _fillings(filled, param):
            self.repeated[_fill(filled, braces)] = tuple(_fill(t, braces) for t in tensors)


def _fillings(template: str, param: Param) -> list[dict[str, int]]:
    """The values of the axes that a template spreads over several tensors."""
    found: list[dict[str, int]] = [{}]
    for axis, size in zip(param.axes, param.shape, strict=True):
        if f"{{{axis}}}" in template:
            found = [{**f, axis: i} for f in found for i in range(size)]
    return found


def _fill(template: str, values: dict[str, int]) -> str:
    for axis, i in values.items():
        template = template.replace(f"{{{axis}}}", str(i))
    return template


def element_of(param: Param, hf: str | None) -> Param:
    spec = None if param.sharding is None else PartitionSpec(*param.sharding[1:])
    shape = param.shape[1:]
    return replace(param, axes=param.axes[1:], shape=shape, sharding=spec, hf=hf)


def is_listed(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def with_index(name: str, path: str, index: int) -> str:
    """`layers.attn.q` as `layers.3.attn.q`: the place of an element, as in a list."""
    parts, head = name.split("."), path.split(".")[0]
    if is_listed(path) or head not in parts:
        last = parts[-1] in ("weight", "bias")
        at = len(parts) - last
    else:
        at = parts.index(head) + 1
    return ".".join([*parts[:at], str(index), *parts[at:]])


def _copied(template: str, path: str, name: str, index: int) -> str:
    """The tensor of a copy: renamed as the copy's path is."""
    if template == path:
        return name
    parts, old, new = template.split("."), path.split("."), name.split(".")
    if len(new) > len(old):
        return with_index(template, path, index)
    if old[0] in parts:
        return ".".join(new[0] if part == old[0] else part for part in parts)
    return ".".join([*parts[:1], f"again{index}", *parts[1:]])
