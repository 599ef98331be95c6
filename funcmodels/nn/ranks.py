"""The ranks that share a layer."""

from __future__ import annotations

from typing import TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from compiler.comm import Processes, over
from funcmodels.errors import ShardingError

Mesh: TypeAlias = DeviceMesh | dist.ProcessGroup | None


def ranks_of(mesh: Mesh) -> Processes | None:
    """The ranks along the "tp" dim of a mesh, or of a group; None where there is but one.

    Raises:
        ShardingError: the mesh has no such dim, or it is no mesh that this process is in.
    """
    if mesh is None:
        return None
    group = _tp_group(mesh) if isinstance(mesh, DeviceMesh) else mesh
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ShardingError(
            "a layer cannot be cut over ranks that this process is not one of",
            got=f"mesh={mesh!r}",
            need="a DeviceMesh, a process group that this process is in, or None",
            fix='init_device_mesh(device, (2,), mesh_dim_names=("tp",))',
        )
    return over(group) if dist.get_world_size(group) > 1 else None


def _tp_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    names = mesh.mesh_dim_names
    if names is None and mesh.ndim == 1:
        return mesh.get_group()
    if names is None or "tp" not in names:
        raise ShardingError(
            'the mesh of a layer has no dim "tp"',
            got=f"a mesh of shape {tuple(mesh.shape)} with dims {names}",
            need='a dim "tp", or one dim without a name, or a process group',
            fix='init_device_mesh(device, (2, 4), mesh_dim_names=("dp", "tp"))'
            if names is None
            else f"mesh=mesh.get_group({names[-1]!r}), to cut layers over that dim",
        )
    return mesh.get_group("tp")


def vary(x: Tensor, mesh: Mesh) -> Tensor:
    """A value that is whole on each rank, from here on used differently by each.

    The same value; its gradient is summed over the ranks. Layers do it for what they are given and
    hold. It is for a parameter of your own: one factor a feature, say, on what a column-parallel
    layer returns. Without it, each rank would have the gradient of its own part only.

    Args:
        x: of any shape, the same on all ranks.
        mesh: as of the layers; None returns x.
    """
    return vary_over(ranks_of(mesh), x)


def vary_over(ranks: Processes | None, x: Tensor) -> Tensor:
    """`vary`, over ranks that are known."""
    if ranks is None:
        return x
    (x,) = ranks.call("vary", [x])
    return x
