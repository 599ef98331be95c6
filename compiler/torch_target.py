"""`compile_to_torch`: a model as an ordinary `nn.Module`, whole or one rank's part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compiler.check import check_needs
from compiler.comm import Comm, Processes
from compiler.evaluate import local_weights, run
from compiler.ir import Program
from compiler.partition import Partitioned, partition
from compiler.trace import trace
from funcmodels import tree
from funcmodels.errors import ShapeError, ShardingError
from funcmodels.init import init
from funcmodels.spec import Model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def compile_to_torch(model: Model, mesh: DeviceMesh | None = None) -> CompiledModel:
    """A model as a module.

    Without a mesh its forward is the user's own function. With one that has an axis "tp", each
    process holds its part of the parameters and runs the partitioned program, with differentiable
    collectives: every gradient is the whole gradient of what the process holds.

    Args:
        model: the model.
        mesh: a DeviceMesh with the one dim "tp", or None.
    Returns:
        A module with parameters on the meta device; fill them with `load` or `reset`.
    Raises:
        ShardingError: the mesh has other dims, or its size does not divide the model's axes.
    """
    return CompiledModel(model, mesh)


class CompiledModel(nn.Module):
    """A model as an `nn.Module`: parameters by their paths in the tree, and `forward`."""

    def __init__(self, model: Model, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.model = model
        self.comm = _comm(mesh)
        self.programs: dict[tuple[bool, bool], Program] = {}
        program = self.program(batched=False, segments=False)
        if isinstance(program, Partitioned):
            assert self.comm is not None
            check_needs(model, program.needs, self.comm.size)
        for path, param in model.by_path.items():
            _put(self, path, torch.empty(param.shape, dtype=param.dtype, device="meta"))
        if self.comm is not None:
            self.load(self.weights())

    def program(self, *, batched: bool, segments: bool) -> Program | None:
        """The partitioned program for a form of the inputs; None without a mesh."""
        if self.comm is None:
            return None
        key = (batched, segments)
        if key not in self.programs:
            traced = trace(self.model, batched=batched, segments=segments)
            self.programs[key] = partition(traced, "tp")
        return self.programs[key]

    def weights(self) -> Any:
        """The parameters as a pytree with the structure of `model.params`."""
        own = dict(self.named_parameters())
        return tree.map_with_path(lambda path, _: own[path], self.model.params)

    def load(self, weights: Any) -> CompiledModel:
        """Take over weights: a pytree of whole tensors, of which each rank keeps its part."""
        values = dict(tree.items(weights))
        if self.comm is not None:
            program = self.program(batched=False, segments=False)
            assert program is not None
            values = {p: v[0] for p, v in local_weights(program, weights, self.comm).items()}
        for path, value in values.items():
            _put(self, path, value.detach().clone())
        return self

    def reset(self, *, seed: int, dtype: torch.dtype = torch.float32) -> CompiledModel:
        """Initialise: the same values at any number of ranks."""
        return self.load(init(self.model, seed=seed, dtype=dtype))

    def pure(
        self, weights: Any, tokens: Tensor, positions: Tensor, segment_ids: Tensor | None = None
    ) -> Tensor:
        """The local function: of this rank's weights, for `torch.func`."""
        if self.comm is None:
            return self.model.forward(weights, tokens, positions, segment_ids)
        if tokens.ndim not in (1, 2):
            raise ShapeError(
                f"tokens of {tokens.ndim} dims",
                got=str(tuple(tokens.shape)),
                need="(num_tokens,) or (batch, seq)",
                fix="tokens.flatten(0, -2)",
            )
        program = self.program(batched=tokens.ndim == 2, segments=segment_ids is not None)
        assert program is not None
        local = {path: [value] for path, value in tree.items(weights)}
        return run(program, local, tokens, positions, self.comm, segment_ids=segment_ids)[0]

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Tensor:
        """Logits.

        Args:
            tokens: (*batch, seq) int64.
            positions: of the shape of tokens; counted from 0 by default.
            segment_ids: of the shape of tokens; which packed document each token is of.
        Returns:
            (*batch, seq, vocab).
        """
        if positions is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
        return self.pure(self.weights(), tokens, positions, segment_ids)


def _comm(mesh: DeviceMesh | None) -> Comm | None:
    """How the ranks of a mesh reach each other."""
    if mesh is None:
        return None
    if mesh.mesh_dim_names != ("tp",):
        raise ShardingError(
            "compile_to_torch knows one mesh axis",
            got=f"mesh dims {mesh.mesh_dim_names}",
            need='a mesh with the one dim "tp"',
            fix='init_device_mesh(device, (n,), mesh_dim_names=("tp",))',
        )
    return Processes(mesh.get_group("tp"))


def _put(module: nn.Module, path: str, value: Tensor) -> None:
    """Set the parameter at a path, through modules made as they are needed."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module._modules[parent]  # type: ignore[assignment]
    module.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))
