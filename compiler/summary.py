"""What a model's parameters are, as a table: shapes, axes, sharding, and bytes on each rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from compiler.shown import bytes_text
from funcmodels.sharding import local_shape
from funcmodels.spec import Model


@dataclass
class Row:
    """Parameters that differ in their place in lists only."""

    path: str
    count: int
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    sharding: tuple[str | None, ...]
    local_bytes: list[int]


def rows(
    model: Model, *, tp: Sequence[int] = (1,), dtype: torch.dtype = torch.bfloat16
) -> list[Row]:
    """One row for `layers.*.attn.q`, however many layers there are.

    Args:
        tp: numbers of tensor-parallel ranks, of which each gets a figure: bytes on one rank.
        dtype: of every parameter that declares none of its own.
    """
    found: dict[tuple, Row] = {}
    for path, param in model.by_path.items():
        spec = model.specs[path]
        collapsed = re.sub(r"\.\d+(?=\.|$)", ".*", path)
        row = found.setdefault(
            (collapsed, param.axes, param.shape, spec),
            Row(collapsed, 0, param.shape, param.axes, tuple(spec), [0] * len(tp)),
        )
        row.count += 1
        for i, ranks in enumerate(tp):
            local = prod(local_shape(param.shape, spec, {"tp": ranks}))
            row.local_bytes[i] += local * (param.dtype or dtype).itemsize
    return list(found.values())


def parameter_table(
    model: Model, *, tp: Sequence[int] = (1,), dtype: torch.dtype = torch.bfloat16
) -> Table:
    """The rows as a table to print, with totals; `heads/tp` is an axis cut over a mesh axis."""
    found = rows(model, tp=tp, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    deepest = max(row.count for row in found)
    table = Table(
        title=f"{model.name}: {model.num_parameters:,} parameters",
        caption=f"heads/tp: cut over the ranks of tp; tp=...: bytes on each, in {name}"
        + (f"\n*: the {deepest} layers together" if deepest > 1 else ""),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_footer=True,
    )
    table.add_column("path", footer="total", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("axes/sharding")
    for i, ranks in enumerate(tp):
        total = sum(row.local_bytes[i] for row in found)
        table.add_column(f"tp={ranks}", bytes_text(total), justify="right", no_wrap=True)
    for row in found:
        axes = [f"{a}/{m}" if m else a for a, m in zip(row.axes, row.sharding, strict=True)]
        shape = "×".join(map(str, row.shape)) or "scalar"
        table.add_row(row.path, shape, " ".join(axes), *map(bytes_text, row.local_bytes))
    return table
