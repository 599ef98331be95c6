"""`compile_to_torch`: a model as an ordinary `nn.Module`, whole or one process's part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from compiler.check import check_needs
from compiler.evaluate import param_placements
from compiler.ir import Program
from compiler.linked import Linked
from compiler.losses import LossOptions, model_of_losses, next_tokens
from compiler.mesh import Layout, Place, Ranks, device_of
from compiler.partition import Partitioned, partition
from compiler.reduce import global_mean, summed_late
from compiler.trace import trace
from funcmodels import tree
from funcmodels.errors import ShapeError, ShardingError
from funcmodels.init import init_one
from funcmodels.spec import Model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def compile_to_torch(
    model: Model, mesh: DeviceMesh | None = None, *, sequence_parallel: bool = False
) -> CompiledModel:
    """A model as a module.

    Without a mesh its forward is the user's own function. A mesh may have any of the dims

    - "dp": each rank has a batch of its own; gradients are summed over the ranks.
    - "fsdp": as dp, and each rank holds a part of every parameter. The whole ones are gathered for
      one block at a time and freed after it.
    - "tp": the ranks share each layer, as the model's axis table says; they have the same batch.

    Then each process holds its part of the parameters, and the gradients are of what it holds: of
    the sum of the dp and fsdp ranks' losses. `mean` makes the loss the global one.

    Args:
        model: the model.
        mesh: a DeviceMesh with named dims, or None.
        sequence_parallel: between the layers that tp divides, cut activations over the tokens, and
            with them norms and residuals.
    Returns:
        A module with parameters on the meta device; fill them with `load` or `reset`, which put
        them on the mesh's current device: call `torch.cuda.set_device` first.
    Raises:
        ShardingError: the mesh has a dim of another name, or a size that the model does not allow.
    """
    return CompiledModel(model, mesh, sequence_parallel=sequence_parallel)


class CompiledModel(nn.Module):
    """A model as an `nn.Module`: parameters by their paths in the tree, and `forward`."""

    def __init__(
        self, model: Model, mesh: DeviceMesh | None = None, *, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.mesh = mesh
        self.ranks = None if mesh is None else Ranks(mesh)
        self.sequence_parallel = sequence_parallel
        if sequence_parallel and (self.ranks is None or self.ranks.sizes["tp"] == 1):
            raise ShardingError(
                "sequence_parallel needs ranks that share the layers",
                got=f"mesh sizes {None if self.ranks is None else self.ranks.sizes}",
                need='a mesh dim "tp" of 2 or more',
                fix="sequence_parallel=False",
            )
        self.programs: dict[Any, Program] = {}
        self.linked: dict[str, Linked] = {}
        self.of_losses: dict[str, Model] = {}
        placements = {}
        if self.ranks is not None and self.ranks.tp is not None:
            program = self.program(batched=False, segments=False)
            assert isinstance(program, Partitioned)
            check_needs(model, program.needs, self.ranks.tp.size)
            placements = param_placements(program)
        self.layout = None if self.ranks is None else Layout(model, self.ranks, placements)
        self.held: dict[str, tuple[int, ...]] = {}
        for path, param in model.by_path.items():
            shape = param.shape if self.layout is None else self.layout.place(path).size
            self.held[path] = tuple(shape)
            put_parameter(self, path, torch.empty(shape, dtype=param.dtype, device="meta"))

    def program(
        self, *, batched: bool, segments: bool, losses: LossOptions | None = None
    ) -> Program:
        """The program for a form of the inputs, partitioned where there are tp ranks.

        Of logits, or, with options, of each token's loss.
        """
        key = (batched, segments, losses)
        if key not in self.programs:
            model = self.model if losses is None else model_of_losses(self.model, losses)
            traced = trace(model, batched=batched, segments=segments)
            if self.ranks is not None and self.ranks.tp is not None:
                traced = partition(traced, "tp", sequence=self.sequence_parallel)
            self.programs[key] = traced
        return self.programs[key]

    # Parameters

    def weights(self) -> Any:
        """The parameters of this process, as a pytree with the structure of `model.params`."""
        own = dict(self.named_parameters())
        return tree.map_with_path(lambda path, _: own[path], self.model.params)

    def load(self, weights: Any) -> CompiledModel:
        """Take over weights: a pytree of whole tensors, of which each process keeps its part.

        On a mesh the parts lie on the mesh's device, wherever the weights are.
        """
        for path, value in tree.items(weights):
            self._take(path, value, value.device if self.mesh is None else device_of(self.mesh))
        return self

    def reset(
        self,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> CompiledModel:
        """Initialise: the same values on any mesh.

        Args:
            seed, dtype: see `fm.init`.
            device: of the parameters; by default the mesh's current device, and the CPU without.
        """
        device = device_of(self.mesh) if device is None else torch.device(device)
        for path in self.model.by_path:
            # Drawn on the CPU, where whole ones have room, and cut before they are moved.
            self._take(path, init_one(self.model, path, seed=seed, dtype=dtype), device)
        return self

    def _take(self, path: str, whole: Tensor, device: torch.device) -> None:
        own = (whole if self.layout is None else self.layout.local(path, whole)).detach()
        put_parameter(self, path, copied_to(own, device))

    def placements(self) -> dict[str, Place]:
        """Where each parameter of this process lies in the whole one, by path.

        Gradients and the state of an optimiser that have a parameter's shape lie as it does.
        """
        if self.layout is not None:
            return {path: self.layout.place(path) for path in self.model.by_path}
        shapes = {path: tuple(param.shape) for path, param in self.model.by_path.items()}
        return {path: Place(shape, (0,) * len(shape), shape) for path, shape in shapes.items()}

    def whole(self, local: Any = None) -> Any:
        """Whole tensors on every process, from each one's part; all processes must call it.

        Args:
            local: a pytree as `weights()`, for instance gradients; the weights by default.
        """
        local = self.weights() if local is None else local
        if self.layout is None:
            return tree.map(lambda x: x.detach(), local)
        return tree.map_with_path(self.layout.whole, local)

    # The function

    def pure(
        self, weights: Any, tokens: Tensor, positions: Tensor, segment_ids: Tensor | None = None
    ) -> Tensor:
        """The local function: of this process's weights, for `torch.func`."""
        return self._run(None, weights, tokens, positions, segment_ids)

    def loss(
        self,
        weights: Any,
        batch: Mapping[str, Tensor],
        *,
        chunk: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """`fm.loss` of this process's weights and rows: the mean over those of all processes.

        Where tp cuts the vocabulary, each rank works on its part of the logits, a chunk of tokens
        at a time, and what is sent is three numbers a token.

        Args:
            weights: as of `weights()`.
            batch: as of `fm.pack`, without targets of its own: the rows of this process.
            chunk, label_smoothing, z_loss: see `ops.cross_entropy`.
        """
        options = LossOptions(chunk, label_smoothing, z_loss)
        given = next_tokens(batch)
        tokens, positions, mask = (given[n] for n in ("tokens", "positions", "loss_mask"))
        each = self._run(options, weights, tokens, positions, given.get("segment_ids")).squeeze(-1)
        return self.mean(torch.where(mask != 0, each, 0), mask.to(each.dtype))

    def _run(
        self,
        losses: LossOptions | None,
        weights: Any,
        tokens: Tensor,
        positions: Tensor,
        segment_ids: Tensor | None,
    ) -> Tensor:
        """Logits, or with options each token's loss, (*batch, seq, 1)."""
        forward = self._forward(losses)
        if self.ranks is None:
            return forward(weights, tokens, positions, segment_ids)
        local = dict(tree.items(weights))
        self._check_parts(local)
        if self.ranks.dp is not None:
            local = summed_late(self.ranks.dp, local)
        if self.ranks.tp is None and self.ranks.fsdp is None:
            weights = tree.unflatten(self.model.params, local)
            return forward(weights, tokens, positions, segment_ids)
        linked = self._linked(local, tokens, segment_ids, losses)
        inputs = [tokens, positions, *([] if segment_ids is None else [segment_ids])]
        return linked(local, inputs)

    def _forward(self, losses: LossOptions | None) -> Callable[..., Tensor]:
        """The user's function of whole weights, or that of each token's loss."""
        if losses is None:
            return self.model.forward
        return self.of_losses[_make_losses(self, *losses)].forward

    def _linked(
        self,
        local: dict[str, Tensor],
        tokens: Tensor,
        segment_ids: Any,
        losses: LossOptions | None = None,
    ) -> Linked:
        """The program as functions, for what these inputs are."""
        assert self.layout is not None
        if tokens.ndim not in (1, 2):
            raise ShapeError(
                f"tokens of {tokens.ndim} dims",
                got=str(tuple(tokens.shape)),
                need="(num_tokens,) or (batch, seq)",
                fix="tokens.flatten(0, -2)",
            )
        batched, segments = tokens.ndim == 2, segment_ids is not None
        undeclared = (p for p, param in self.model.by_path.items() if param.dtype is None)
        path = next(undeclared, None)
        dtype = torch.float32 if path is None else local[path].dtype
        if self.sequence_parallel:
            self._check_divides(tokens)
        options = None if losses is None else (losses.chunk, losses.label_smoothing, losses.z_loss)
        return self.linked[_link(self, batched, segments, dtype, tokens.device, options)]

    def _check_parts(self, local: dict[str, Tensor]) -> None:
        """Weights are this process's parts: whole ones would be taken for parts of larger ones."""
        for path, held in self.held.items():
            got = tuple(local[path].shape)
            if got != held:
                whole = tuple(self.model.by_path[path].shape)
                raise ShapeError(
                    f"{path} is not the part of it that this process holds",
                    got=f"{got}{', the whole parameter' * (got == whole)}",
                    need=f"{held}, of {whole}",
                    fix="weights = module.load(weights).weights()",
                )

    def _check_divides(self, tokens: Tensor) -> None:
        """The tokens of a sequence can be cut over the tp ranks."""
        assert self.ranks is not None
        seq, tp = tokens.shape[-1], self.ranks.sizes["tp"]
        if seq % tp:
            raise ShapeError(
                "a sequence that the tp ranks do not divide",
                got=f"{seq} tokens, tp={tp}",
                need="sequence_parallel: tp divides the last dim of tokens",
                fix=f"pad to {-(-seq // tp) * tp} tokens, or sequence_parallel=False",
            )

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

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean over the batches of all processes: what a loss must be made with on a mesh.

        sum(weights * values) / sum(weights), both summed over the dp and fsdp ranks too. So ranks
        that mask different numbers of tokens count as the tokens do. The result is the same on
        every process, and the gradients of `pure` are its gradients.

        Args:
            values: one a token, or of any shape.
            weights: of the shape of values, for instance a loss mask; ones by default.
        """
        return global_mean([] if self.ranks is None else self.ranks.of_data, values, weights)


# torch.compile calls these, and does not look into them. It gives them named tuples without what
# is in them, and so they take plain ones.


@torch.compiler.assume_constant_result
def _link(
    module: CompiledModel,
    batched: bool,
    segments: bool,
    dtype: torch.dtype,
    device: torch.device,
    options: tuple[int | None, float, float] | None,
) -> str:
    """See that a program is there as functions, whatever transforms are at work; its key."""
    key = repr((batched, segments, dtype, device, options))
    if key not in module.linked:
        assert module.layout is not None
        with temporarily_clear_interpreter_stack(), torch.enable_grad(), _not_compiling():
            losses = None if options is None else LossOptions(*options)
            program = module.program(batched=batched, segments=segments, losses=losses)
            module.linked[key] = Linked(program, module.layout, dtype, device)
    return key


@torch.compiler.assume_constant_result
def _make_losses(
    module: CompiledModel, chunk: int | None, label_smoothing: float, z_loss: float
) -> str:
    """See that the model of losses is there; its key."""
    losses = LossOptions(chunk, label_smoothing, z_loss)
    key = repr(losses)
    if key not in module.of_losses:
        module.of_losses[key] = model_of_losses(module.model, losses)
    return key


@contextmanager
def _not_compiling() -> Iterator[None]:
    """A model is recorded as it runs by itself: in what torch.compile compiles, ops differ."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def copied_to(value: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy on a device, whether or not the value is there already."""
    return torch.empty(value.shape, dtype=value.dtype, device=device).copy_(value)


def put_parameter(module: nn.Module, path: str, value: Tensor) -> None:
    """Set the parameter at a path, through modules made as they are needed."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module._modules[parent]  # type: ignore[assignment]
    module.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))
