"""Parameters that share a tensor of the checkpoint, as the rest of the compiler sees them: apart.

    q: "qkv_proj.weight: (heads[0:4/8] head_dim) hidden"    k: "...(kv_heads[4:6/8] ...", v: ...
->
    q: "qkv_proj#0.weight: (heads head_dim) hidden"         k: "qkv_proj#1.weight: ...", v: ...

and the loader takes `qkv_proj.weight` apart into `qkv_proj#0.weight`, `qkv_proj#1.weight`, ... A
layer that is made of all of them is named as the checkpoint names their tensor: `qkv_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from funcmodels.parts import part_of, without_parts
from funcmodels.spec import Model, Param

MARK = "#"


@dataclass(frozen=True)
class Shared:
    """A tensor of the checkpoint that is several parameters.

    Args:
        dim, unit: they lie along this dim, by units of so many rows.
        parts: the name that each goes by, and how many units of every turn it has.
        turns: how often they follow each other: 1 where each is in one piece.
    """

    dim: int
    unit: int
    parts: tuple[tuple[str, int], ...]
    turns: int


def set_apart(model: Model) -> tuple[dict[str, Param], dict[str, Shared]]:
    """The parameters, each with a tensor of its own, and the tensors that are several of them."""
    params = dict(model.by_path)
    owners: dict[str, list[str]] = {}
    for path, map_ in model.tensor_maps.items():
        if map_.part is not None:
            for name in map_.names:
                owners.setdefault(name, []).append(path)
    shared = {name: _shared(model, name, paths) for name, paths in owners.items()}
    for paths in owners.values():
        for i, path in enumerate(_in_order(model, paths)):
            template, _, layout = str(model.by_path[path].hf).partition(":")
            hf = f"{numbered(template.strip(), i)}:{without_parts(layout)}"
            params[path] = replace(model.by_path[path], hf=hf)
    return params, shared


def _in_order(model: Model, paths: list[str]) -> list[str]:
    return sorted(paths, key=lambda path: model.tensor_maps[path].part.start)  # type: ignore[union-attr]


def _shared(model: Model, name: str, paths: list[str]) -> Shared:
    found = [model.tensor_maps[path].part for path in _in_order(model, paths)]
    parts = tuple((numbered(name, i), p.width) for i, p in enumerate(found) if p is not None)
    first = found[0]
    assert first is not None
    rows = model.tensor_maps[paths[0]].tensor_shape()[first.dim]
    return Shared(first.dim, first.unit, parts, rows // (first.period * first.unit))


def numbered(tensor: str, index: int) -> str:
    """`attn.qkv_proj.weight` as `attn.qkv_proj#0.weight`."""
    module = tensor.removesuffix(".weight").removesuffix(".bias")
    return f"{module}{MARK}{index}{tensor[len(module) :]}"


def place_in_tensor(param: Param) -> tuple[str, int] | None:
    """The tensor that a parameter is a part of, and a number that orders its parts; or None.

    None too where the tensor has its elements in another order.
    """
    template, _, layout = str(param.hf or "").partition(":")
    stored = re.findall(r"[A-Za-z_]\w*", without_parts(layout)) or list(param.axes)
    if stored != [axis for axis in param.axes if f"{{{axis}}}" not in template]:
        return None
    name, mark, index = template.strip().partition(MARK)
    if mark:
        number, dot, kind = index.partition(".")
        return name + dot + kind, int(number)
    part = part_of(layout, dict(zip(param.axes, param.shape, strict=True)), name, param.where)
    return None if part is None else (name, part.start)


def stem(module: str) -> str:
    """The module that a part is of: `attn.qkv_proj` of `attn.qkv_proj#0`; itself of another."""
    return module.partition(MARK)[0]


def whole_modules(shared: Mapping[str, Shared]) -> dict[str, int]:
    """Modules whose tensors hold their parameters one after another -> how many they are."""
    return {
        stem(parts.parts[0][0]): len(parts.parts) for parts in shared.values() if parts.turns == 1
    }
