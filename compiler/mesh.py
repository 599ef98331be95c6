"""A mesh of processes, and which part of each parameter a process of it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from compiler.comm import Processes
from compiler.placement import Placement, Shard
from funcmodels.errors import ShardingError

if TYPE_CHECKING:
    from funcmodels.spec import Model

DIMS = ("dp", "fsdp", "tp")


def device_of(mesh: DeviceMesh | None) -> torch.device:
    """Where a process of a mesh holds its parameters: the current device of the mesh's type.

    NCCL sends nothing from the CPU's memory. Without a mesh it is the CPU.
    """
    if mesh is None or mesh.device_type == "cpu":
        return torch.device("cpu")
    current = torch.get_device_module(mesh.device_type).current_device()
    return torch.device(mesh.device_type, current)


@dataclass(frozen=True)
class Place:
    """Where a process's tensor lies in the whole parameter: a box.

    Args:
        shape: of the whole parameter.
        offset: of the box's first element, in each dim.
        size: of the box: the shape of the process's tensor.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """One dim of a rank's parameter, divided over the fsdp ranks: the last ones may have less.

    Args:
        dim: the dim.
        size: its size before.
        parts: how many ranks there are.
    """

    dim: int
    size: int
    parts: int

    @property
    def width(self) -> int:
        """The size of every rank's part, filled up with zeros while it is sent."""
        return -(-self.size // self.parts)

    def part(self, rank: int) -> tuple[int, int]:
        """Start and length of a rank's part."""
        start = min(rank * self.width, self.size)
        return start, min(self.width, self.size - start)

    def filled(self, x: Tensor) -> Tensor:
        """A rank's part in the size that all of them are sent in."""
        missing = self.width - x.shape[self.dim]
        return F.pad(x, (0, 0) * (x.ndim - 1 - self.dim) + (0, missing)) if missing else x

    def rows(self, whole: Tensor) -> Tensor:
        """(ranks, *shape of a part): a whole tensor as the ranks' parts, each filled up."""
        if missing := self.width * self.parts - self.size:
            whole = F.pad(whole, (0, 0) * (whole.ndim - 1 - self.dim) + (0, missing))
        return whole.unflatten(self.dim, (self.parts, self.width)).movedim(self.dim, 0)


def cut_of(shape: tuple[int, ...], parts: int) -> Cut | None:
    """How a parameter is cut: along the first dim that the ranks divide, else its largest.

    A scalar is not cut.
    """
    if not shape:
        return None
    divided = (dim for dim, size in enumerate(shape) if size % parts == 0)
    dim = next(divided, shape.index(max(shape)))
    return Cut(dim, shape[dim], parts)


def _as_mesh(given: object) -> str:
    """The call that makes a mesh of what was perhaps meant: {"tp": 2}, or 2 processes."""
    sizes, names = (2,), ("dp",)
    if isinstance(given, dict) and given and set(given) <= set(DIMS):
        sizes, names = tuple(given.values()), tuple(given)
    elif isinstance(given, int):
        sizes = (given,)
    return f"init_device_mesh(device, {sizes}, mesh_dim_names={names})"


class Ranks:
    """The ranks of this process along each dim of a mesh; None where a dim has one rank or is none.

    Raises:
        ShardingError: it is no DeviceMesh, or has a dim that is not known.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        if not isinstance(mesh, DeviceMesh):
            raise ShardingError(
                "compile_to_torch was given a mesh that is no DeviceMesh",
                got=f"mesh={mesh!r}",
                need="a torch.distributed DeviceMesh with named dims, or None",
                fix=f"mesh = {_as_mesh(mesh)}",
            )
        names = mesh.mesh_dim_names or ()
        unknown = [name for name in names if name not in DIMS]
        if unknown or not names:
            raise ShardingError(
                f"compile_to_torch knows no mesh dim {unknown[0]!r}"
                if unknown
                else "the dims of this mesh have no names",
                got=f"mesh dims {names}",
                need='any of "dp" (batches), "fsdp" (batches and parameters), "tp" (layers)',
                fix='init_device_mesh(device, (2, 4), mesh_dim_names=("fsdp", "tp"))'
                + ('; pipeline stages: fm.pipeline_stage(model, mesh["pp"])' * ("pp" in unknown)),
            )
        sizes = dict(zip(names, mesh.shape, strict=True))
        found = {
            name: Processes(mesh.get_group(name)) if sizes.get(name, 1) > 1 else None
            for name in DIMS
        }
        self.dp, self.fsdp, self.tp = (found[name] for name in DIMS)
        self.sizes: dict[str, int] = {name: sizes.get(name, 1) for name in DIMS}

    @classmethod
    def alone(cls) -> Ranks:
        """One process."""
        ranks = cls.__new__(cls)
        ranks.dp = ranks.fsdp = ranks.tp = None
        ranks.sizes = dict.fromkeys(DIMS, 1)
        return ranks

    @property
    def of_data(self) -> list[Processes]:
        """The dims along which ranks have batches of their own."""
        return [comm for comm in (self.dp, self.fsdp) if comm is not None]


class Layout:
    """Which part of each parameter this process holds.

    Args:
        model: the model.
        ranks: of this process.
        placements: of the parameters over tp, by path; whole where none is given.
    """

    def __init__(self, model: Model, ranks: Ranks, placements: dict[str, Placement]) -> None:
        self.model = model
        self.ranks = ranks
        self.over_tp = {
            path: at for path, at in placements.items() if isinstance(at, Shard) and ranks.tp
        }
        self.cuts = {
            path: cut_of(self.tp_shape(path), ranks.fsdp.size) if ranks.fsdp else None
            for path, param in model.by_path.items()
            if param.dtype is None or param.dtype.is_floating_point
        }

    def tp_shape(self, path: str) -> tuple[int, ...]:
        """The shape of a parameter on one tp rank."""
        shape = list(self.model.by_path[path].shape)
        if (at := self.over_tp.get(path)) is not None:
            assert self.ranks.tp is not None
            tp = self.ranks.tp
            shape[at.dim] //= tp.size // tp.replicas(at.units)
        return tuple(shape)

    def place(self, path: str) -> Place:
        """Where this process's part of a parameter lies."""
        whole = self.model.by_path[path].shape
        offset, size = [0] * len(whole), list(self.tp_shape(path))
        if (at := self.over_tp.get(path)) is not None:
            tp = self.ranks.tp
            assert tp is not None
            offset[at.dim] = tp.rank // tp.replicas(at.units) * size[at.dim]
        if (cut := self.cuts.get(path)) is not None:
            assert self.ranks.fsdp is not None
            start, size[cut.dim] = cut.part(self.ranks.fsdp.rank)
            offset[cut.dim] += start
        return Place(tuple(whole), tuple(offset), tuple(size))

    def local(self, path: str, whole: Tensor) -> Tensor:
        """This process's part of a whole parameter: a view."""
        place = self.place(path)
        for dim, (start, size) in enumerate(zip(place.offset, place.size, strict=True)):
            whole = whole.narrow(dim, start, size)
        return whole

    def whole(self, path: str, part: Tensor) -> Tensor:
        """A whole parameter, or what has its shape, from the parts of all processes."""
        part = part.detach()
        with torch.no_grad():
            if (cut := self.cuts.get(path)) is not None:
                assert self.ranks.fsdp is not None
                filled = cut.filled(part)
                (part,) = self.ranks.fsdp.whole([filled], cut.dim, cut.parts)
                part = part.narrow(cut.dim, 0, cut.size)
            if (at := self.over_tp.get(path)) is not None:
                assert self.ranks.tp is not None
                (part,) = self.ranks.tp.whole([part], at.dim, at.units)
        return part.contiguous()
