"""Axis table -> PartitionSpec -> local shapes, and every check that needs no graph.

A table maps logical axes to mesh axes, `{"heads": "tp", "mlp": "tp"}`. It is the only sharding
input: local shapes, collectives, vLLM layers and loading all follow from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from funcmodels.errors import DeclarationError, ShardingError, listed

if TYPE_CHECKING:
    from funcmodels.spec import Param

MESH_AXES = ("tp", "ep", "dp", "fsdp", "pp")

AxisTable: TypeAlias = Mapping[str, str | None] | Sequence[tuple[str, str | None]]


class PartitionSpec(tuple):
    """One mesh axis or None per dim of a tensor: `PartitionSpec("tp", None)`."""

    def __new__(cls, *mesh_axes: str | None) -> PartitionSpec:
        return super().__new__(cls, mesh_axes)

    def __repr__(self) -> str:
        return f"PartitionSpec({', '.join(map(repr, self))})"


def table_of(rules: AxisTable) -> dict[str, str | None]:
    """The axis table as a dict. Rules match first-wins: a later rule for an axis is not reached."""
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    table: dict[str, str | None] = {}
    for axis, mesh_axis in pairs:
        if mesh_axis is not None and mesh_axis not in MESH_AXES:
            raise ShardingError(
                f'axis "{axis}" is put on an unknown mesh axis "{mesh_axis}"',
                need=f"one of {listed(MESH_AXES)}, or None",
                fix=f'"{axis}": "tp"',
            )
        table.setdefault(axis, mesh_axis)
    return table


def partition_spec(param: Param, table: Mapping[str, str | None]) -> PartitionSpec:
    """Where each dim of a parameter goes: its own PartitionSpec, or the table's word for its axes.

    Raises:
        ShardingError: two dims of the parameter are put on one mesh axis.
    """
    spec = param.sharding
    if spec is None:
        spec = PartitionSpec(*(table.get(axis) for axis in param.axes))
    elif len(spec) != len(param.axes):
        raise ShardingError(
            f"a PartitionSpec of {len(spec)} dims on a parameter of {len(param.axes)}",
            got=f"{spec!r} for ({', '.join(param.axes)})",
            need="one mesh axis or None per dim",
            from_=param.where,
            fix=f"PartitionSpec({', '.join(['None'] * len(param.axes))})",
        )
    for mesh_axis in {m for m in spec if m is not None}:
        dims = [axis for axis, m in zip(param.axes, spec, strict=True) if m == mesh_axis]
        if len(dims) > 1:
            raise ShardingError(
                f'two dims of one tensor on mesh axis "{mesh_axis}"',
                got=" and ".join(f'"{d}"' for d in dims) + f" of ({', '.join(param.axes)})",
                need="at most one dim of a tensor on a mesh axis",
                from_=param.where,
                fix=f"sharding=fm.PartitionSpec({_keep_first(param.axes, dims[0], mesh_axis)}) "
                f'on this parameter, or leave "{dims[1]}" out of the table',
            )
    return spec


def _keep_first(axes: tuple[str, ...], kept: str, mesh_axis: str) -> str:
    return ", ".join(repr(mesh_axis) if axis == kept else "None" for axis in axes)


def local_size(size: int, parts: int) -> int:
    """Size of a dim on one rank: split where the parts divide it, else one of it, replicated.

    A dim of 2 KV heads over 4 ranks leaves one head on each, and each head on two ranks.
    """
    return size // parts if size >= parts else 1


def local_shape(
    shape: Iterable[int], spec: PartitionSpec, mesh: Mapping[str, int]
) -> tuple[int, ...]:
    """The shape that one rank of a mesh, given as axis -> size, holds."""
    return tuple(
        local_size(n, mesh.get(axis, 1)) if axis else n for n, axis in zip(shape, spec, strict=True)
    )


def check_table(table: Mapping[str, str | None], declared: set[str]) -> None:
    """Every axis of the table must be declared: a misspelt one would silently not shard."""
    if unknown := [axis for axis in table if axis not in declared]:
        import difflib

        near = difflib.get_close_matches(unknown[0], declared, n=1)
        raise DeclarationError(
            f'sharding names an axis that is not declared: "{unknown[0]}"',
            got=f"sharding of {listed(table)}",
            need=f"axes of fm.axes(), of parameters and states: {listed(sorted(declared))}",
            fix=f'did you mean "{near[0]}"?' if near else f'drop "{unknown[0]}" from sharding',
        )
