"""`fm.pipeline_stage`: a model cut into stages, each of which torch's pipelining can schedule."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from compiler.ir import Program, Sym, TensorType
from compiler.linked import Linked
from compiler.mesh import Layout, Ranks, device_of
from compiler.parts import Part, parts_of
from compiler.torch_target import copied_to, put_parameter
from compiler.trace import trace
from funcmodels import tree
from funcmodels.errors import ShardingError
from funcmodels.init import init_one
from funcmodels.spec import Model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.pipelining import PipelineStage


def pipeline_stage(model: Model, mesh: DeviceMesh, *, segments: bool = False) -> ModelStage:
    """This process's stage of a model, for `torch.distributed.pipelining`.

    The model is cut between the calls of its blocks, where what goes on is floating tensors of
    (batch, seq, ...), into stages of about equally many parameters.

    Args:
        model: the model.
        mesh: a DeviceMesh with the one dim "pp".
        segments: whether `segment_ids` will be given.
    Returns:
        A module with this stage's parameters, on the meta device; fill them with `load` or
        `reset`, which put them on the mesh's current device, then hand `stage.pipelined()` to a
        schedule.
    Raises:
        ShardingError: the mesh has other dims, or the model cannot be cut into so many stages.
    """
    return ModelStage(model, mesh, segments=segments)


class ModelStage(nn.Module):
    """One stage: `forward` takes tokens in the first, and what the stage before returned."""

    def __init__(self, model: Model, mesh: DeviceMesh, *, segments: bool) -> None:
        super().__init__()
        if mesh.mesh_dim_names != ("pp",):
            raise ShardingError(
                "pipeline_stage takes a mesh of stages alone",
                got=f"mesh dims {mesh.mesh_dim_names}",
                need='the one dim "pp"',
                fix='pipeline_stage(model, mesh["pp"])',
            )
        self.model = model
        self.mesh = mesh
        self.group = mesh.get_group("pp")
        self.index, self.count = mesh.get_local_rank("pp"), mesh.size()
        self.program = trace(model, batched=True, segments=segments)
        parts = parts_of(self.program)
        edges = cut_into_stages(self.program, parts, self.count)
        start, end = edges[self.index : self.index + 2]
        self.steps = slice(start, end)
        self.takes = _live(self.program, parts, start) if start else [self.program.root.inputs[0]]
        self.gives = _live(self.program, parts, end)
        used = (path for part in parts[self.steps] for path in part.params.values())
        self.paths = list(dict.fromkeys(used))
        self.linked: dict[Any, Linked] = {}
        for path in self.paths:
            param = model.by_path[path]
            put_parameter(self, path, torch.empty(param.shape, dtype=param.dtype, device="meta"))

    def weights(self) -> dict[str, Tensor]:
        """The parameters of this stage, by their paths in the model."""
        own = dict(self.named_parameters())
        return {path: own[path] for path in self.paths}

    def load(self, weights: Any) -> ModelStage:
        """Take over the stage's part of a pytree of the model's weights, on the mesh's device."""
        values, device = dict(tree.items(weights)), device_of(self.mesh)
        for path in self.paths:
            put_parameter(self, path, copied_to(values[path].detach(), device))
        return self

    def reset(
        self,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> ModelStage:
        """Initialise: the same values in any number of stages.

        Args:
            seed, dtype: see `fm.init`.
            device: of the parameters; by default the mesh's current device.
        """
        device = device_of(self.mesh) if device is None else device
        for path in self.paths:
            value = init_one(self.model, path, seed=seed, dtype=dtype, device=device)
            put_parameter(self, path, value)
        return self

    def pipelined(self, device: torch.device | str | None = None) -> PipelineStage:
        """This stage as torch's, for a schedule as `ScheduleGPipe` or `Schedule1F1B`.

        Args:
            device: what the stages send lies there; by default the mesh's current device.
        """
        from torch.distributed.pipelining import PipelineStage

        at = device_of(self.mesh) if device is None else torch.device(device)
        return PipelineStage(self, self.index, self.count, at, group=self.group)

    def forward(
        self, *xs: Tensor, positions: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Any:
        """What the stage after takes; of the last stage, logits.

        Args:
            xs: tokens (batch, seq), or what the stage before returned.
            positions, segment_ids: (batch, seq), given to every stage; positions are counted from
                0 by default.
        """
        sizes = tuple(xs[0].shape[:2])
        device = xs[0].device
        if positions is None:
            positions = torch.arange(sizes[1], device=device).expand(sizes)
        weights = self.weights()
        linked = self._linked(weights, device)
        _, *rest = self.program.root.inputs
        given = [positions, *([] if segment_ids is None else [segment_ids])]
        values = dict(zip(rest, given, strict=True))
        values.update(zip(self.takes, xs, strict=True))
        found = linked.part(self.steps, sizes, weights, values, self.gives)
        return found[0] if len(found) == 1 else tuple(found)

    def _linked(self, weights: dict[str, Tensor], device: torch.device) -> Linked:
        by_path = self.model.by_path
        dtypes = (x.dtype for path, x in weights.items() if by_path[path].dtype is None)
        key = (next(dtypes, torch.float32), device)
        if key not in self.linked:
            layout = Layout(self.model, Ranks.alone(), {})
            self.linked[key] = Linked(self.program, layout, *key)
        return self.linked[key]


def cut_into_stages(program: Program, parts: list[Part], count: int) -> list[int]:
    """Where stages start and end among a program's parts.

    The largest stage has as few parameters as can be.

    Raises:
        ShardingError: there are too few places to cut at, or a parameter is used in two stages.
    """
    reasons = [_why_not_here(program, parts, i) for i in range(1, len(parts))]
    places = [i for i, why in enumerate(reasons, 1) if why is None]
    if len(places) < count - 1:
        why = next((why for why in reasons if why), None)
        raise ShardingError(
            f"{program.model.name} cannot be cut into {count} pipeline stages",
            got=f"{len(places)} places to cut at" + (f"; elsewhere {why}" if why else ""),
            need="blocks called one after the other, each with what the one before returned",
            fix=f"{len(places) + 1} stages" if places else "no pipeline stages",
        )
    sizes = [_numel(program, part) for part in parts]
    few = len(places) ** (count - 1) < 100_000
    choices = itertools.combinations(places, count - 1) if few else [_evenly(places, count)]
    cuts = min(choices, key=lambda cuts: _largest(sizes, cuts))
    edges = [0, *cuts, len(parts)]
    _check_no_sharing(program, parts, edges)
    return edges


def _live(program: Program, parts: list[Part], end: int) -> list[fx.Node]:
    """The values that the first parts make and later ones, or the caller, need."""
    made = [node for part in parts[:end] for node in part.results if node is not None]
    needed = {node for part in parts[end:] for node in part.inputs} | set(program.root.results)
    return [node for node in made if node in needed]


def _why_not_here(program: Program, parts: list[Part], end: int) -> str | None:
    """Why a program cannot be cut after its first parts, or None where it can."""
    tokens = program.root.inputs[0]
    if any(tokens in part.inputs for part in parts[end:]):
        return "a later block reads the tokens"
    live = _live(program, parts, end)
    if not live:
        return "nothing goes from one block to the next"
    for node in live:
        kind = node.meta["type"]
        if not isinstance(kind, TensorType) or not kind.dtype.is_floating_point:
            return f"what is made at {node.meta['where']} is no floating tensor"
        if kind.shape[:2] != (Sym("batch"), Sym("seq")):
            return f"what is made at {node.meta['where']} is not of (batch, seq, ...)"
    return None


def _numel(program: Program, part: Part) -> int:
    return sum(program.model.by_path[path].numel for path in set(part.params.values()))


def _largest(sizes: list[int], cuts: tuple[int, ...]) -> int:
    edges = [0, *cuts, len(sizes)]
    return max(sum(sizes[start:end]) for start, end in itertools.pairwise(edges))


def _evenly(places: list[int], count: int) -> tuple[int, ...]:
    """Places at equal distances: for so many that not all choices can be looked at."""
    return tuple(places[len(places) * i // count] for i in range(1, count))


def _check_no_sharing(program: Program, parts: list[Part], edges: list[int]) -> None:
    seen: dict[str, int] = {}
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        for path in (path for part in parts[start:end] for path in part.params.values()):
            if seen.setdefault(path, i) != i:
                raise ShardingError(
                    f"{path} is used in two pipeline stages",
                    got=f"stages {seen[path]} and {i} of {len(edges) - 1}",
                    need="parameters that one stage uses: gradients are not summed over stages",
                    from_=program.model.by_path[path].where,
                    fix="untie it, or use fsdp in place of stages",
                )
