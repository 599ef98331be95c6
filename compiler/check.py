"""`fm.check`, `fm.check_grid`: on how many ranks a model can be served; nothing is loaded."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from compiler import layers
from compiler.ir import tensor_type
from compiler.modules import plan_modules
from compiler.needs import Need, served_needs, strongest
from compiler.partition import Partitioned
from compiler.placement import Shard
from compiler.shown import shown
from compiler.split import split_at_unembedding
from compiler.stages import root_of, why_one_stage
from compiler.vllm_target import lower_to_vllm, uncollected
from funcmodels.config_json import FIELD_OF_AXIS, config_of_fields
from funcmodels.errors import ShardingError
from funcmodels.spec import Model

Layout = tuple[int, int, int]  # tp, pp, ep

VOCAB_MULTIPLE = 64  # vLLM's embedding and output layers pad a vocabulary to a multiple of this


def check(model: Model, *, tp: int = 1, pp: int = 1, ep: int = 1) -> list[int]:
    """Refuse sizes of parallelism that the model does not allow.

    Takes no GPU, no weights and no process group.

    Args:
        tp, pp, ep: ranks that share each layer, pipeline stages, ranks that share the experts: of
            tp and of data parallelism together.
    Returns:
        The tensor-parallel sizes that are allowed, at most eight.
    Raises:
        ShardingError: names the axis, what is needed, and the sizes that work.
    """
    with uncollected():
        layouts = Layouts(model, lower_to_vllm(model))
    layouts.check(tp=tp, pp=pp, ep=ep)
    return allowed(layouts.needs)


def check_grid(
    model: Model,
    *,
    tp: Sequence[int] = (1, 2, 4, 8),
    pp: Sequence[int] = (1,),
    ep: Sequence[int] = (1,),
) -> Grid:
    """Which combinations of sizes a model can be served with, and why not with the others.

    Returns:
        A `Grid`: print it, or ask `grid.valid` and `grid.refused[tp, pp, ep]`.
    """
    with uncollected():
        layouts = Layouts(model, lower_to_vllm(model))
    refused = {}
    asked = tuple(product(tp, pp, ep))
    for layout in asked:
        problem = layouts.problem(*layout)
        if problem is not None:
            refused[layout] = problem
    return Grid(model.name, asked, refused)


@dataclass(frozen=True)
class Grid:
    """The answer of `fm.check_grid`.

    Args:
        model: its name.
        layouts: (tp, pp, ep), as they were asked for.
        refused: those that cannot be, each with the error that names need and fix.
    """

    model: str
    layouts: tuple[Layout, ...]
    refused: dict[Layout, ShardingError]

    @property
    def valid(self) -> tuple[Layout, ...]:
        """The layouts that work."""
        return tuple(layout for layout in self.layouts if layout not in self.refused)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=self.model, title_justify="left", box=SIMPLE_HEAD)
        for name in ("tp", "pp", "ep", "ranks"):
            table.add_column(name, justify="right")
        table.add_column("")
        for layout in self.layouts:
            tp, pp, ep = layout
            error = self.refused.get(layout)
            told = "[green]works[/]" if error is None else f"[red]no:[/] {_short(error)}"
            table.add_row(str(tp), str(pp), str(ep), str(max(tp, ep) * pp), told)
        yield table

    def __str__(self) -> str:
        return shown(self)


def _short(error: ShardingError) -> str:
    """An error on one line."""
    need = error.lines.get("need")
    return f"{error.what}; needs {need}" if need else error.what


class Layouts:
    """What a lowered model demands of the sizes of parallelism."""

    def __init__(self, model: Model, program: Partitioned) -> None:
        self.model = model
        self.needs = [*served_needs(program), *_vocabulary(program)]
        # A grid asks for each number of ranks once for every number of stages.
        self.failed_need = functools.cache(functools.partial(failed_need, model, self.needs))
        split = split_at_unembedding(program)
        root = root_of(split.body, plan_modules(program, split).blocks["forward"])
        self.why_one_stage = why_one_stage(split.body, root)
        self.layers = root.layers
        self.heads = None if _cuts_heads(program) else _query_heads(model)
        graphs = [block.graph for block in program.all()]
        self.experts = [n for g in graphs for n in g.nodes if n.target is layers.experts]

    def check(self, *, tp: int, pp: int, ep: int) -> None:
        """Raise for the first demand that is not met."""
        problem = self.problem(tp, pp, ep)
        if problem is not None:
            raise problem

    def problem(self, tp: int, pp: int, ep: int) -> ShardingError | None:
        """The first demand that is not met."""
        return next(self._problems(tp, pp, ep), None)

    def _problems(self, tp: int, pp: int, ep: int) -> Iterator[ShardingError]:
        for name, size in (("tp", tp), ("pp", pp), ("ep", ep)):
            if size < 1:
                yield ShardingError(
                    f"{name} is no number of ranks",
                    got=f"{name}={size}",
                    need="1 or more",
                    fix=f"{name}=1",
                )
        if (found := self.failed_need(tp)) is not None:
            yield found
        if self.heads is not None and self.heads % tp:
            yield ShardingError(
                "vLLM refuses ranks that do not divide the query heads, cut or not",
                got=f"num_attention_heads={self.heads}, tp={tp}",
                need="tp divides num_attention_heads of config.json",
                fix=f"tp in {{{', '.join(map(str, _divisors(self.heads)))}}}",
            )
        yield from self._stages(pp)
        yield from self._experts(tp, ep)

    def _stages(self, pp: int) -> Iterator[ShardingError]:
        if pp == 1:
            return
        if self.why_one_stage is not None:
            yield ShardingError(
                f"{self.model.name} cannot be cut into pipeline stages",
                got=f"pp={pp}, but {self.why_one_stage}",
                need="a loop over the layers that each take what the last one made",
                fix="pp=1, or: for p in params['layers']: x = layer(p, x, positions, segment_ids)",
            )
        elif pp > self.layers:
            yield ShardingError(
                "more pipeline stages than layers",
                got=f"{self.layers} layers, pp={pp}",
                need="at least one layer for each stage",
                fix=f"pp={self.layers}",
            )

    def _experts(self, tp: int, ep: int) -> Iterator[ShardingError]:
        if ep == 1:
            return
        axis = next((axis for axis, mesh in self.model.table.items() if mesh == "ep"), None)
        if axis is None or not self.experts:
            yield ShardingError(
                f"{self.model.name} has no experts to divide",
                got=f"ep={ep}, and no "
                + ('axis on mesh axis "ep"' if axis is None else "ops.experts in forward"),
                need="ep=1" if not self.experts else 'sharding={..., "experts": "ep"}',
                fix="ep=1, and more ranks by tp or pp",
            )
            return
        fewest = min(tensor_type(n.args[3][0]).shape[0] for n in self.experts)  # type: ignore[index,arg-type,type-var]
        if ep > fewest:  # type: ignore[operator]
            yield ShardingError(
                "more ranks than experts",
                got=f"{axis}={fewest}, ep={ep}",
                need="at least one expert for each rank",
                fix=f"ep={fewest}",
            )
        if ep % tp:
            yield ShardingError(
                "experts are divided over the ranks of tp and of data parallelism together",
                got=f"tp={tp}, ep={ep}",
                need="ep is a multiple of tp: 1 times it, or as often as there are data ranks",
                fix=f"ep={tp * max(1, ep // tp)}",
            )
        if ep > tp and any(n.kwargs["kind"] == "row_partial" for n in self.experts):
            yield ShardingError(
                "experts are summed with another layer before the sum over the ranks",
                got=f"tp={tp}, ep={ep}: data parallel ranks exchange tokens within the layer",
                need="no data parallelism, or experts that are summed by themselves",
                fix=f"ep={tp}",
            )


def check_needs(model: Model, needs: Iterable[Need], tp: int) -> None:
    """Raise for the first demand that a number of ranks does not meet."""
    error = failed_need(model, needs, tp)
    if error is not None:
        raise error


def failed_need(model: Model, needs: Iterable[Need], tp: int) -> ShardingError | None:
    """The error for the first demand that a number of ranks does not meet."""
    # A sharded axis asks for little by itself, and for division where an operation needs that.
    needs = strongest(needs)
    failed = [need for need in needs if not need.allows(tp)]
    if not failed:
        return None
    need = failed[0]
    return ShardingError(
        f'cannot split axis "{need.axis}" over mesh axis "tp"',
        got=", ".join([*_sizes(model, needs), f"tp={tp}"]),
        need="; ".join(dict.fromkeys(map(_demand, needs))),
        from_=f"{need.of or _paths(model, need.axis)}, {need.where}",
        fix=f"tp in {{{', '.join(map(str, allowed(needs)))}}}, "
        f'or leave "{need.axis}" out of sharding',
    )


def allowed(needs: Iterable[Need], limit: int = 1024) -> list[int]:
    """The numbers of ranks that meet all demands, up to a limit, at most eight."""
    needs = list(needs)
    return [tp for tp in range(1, limit + 1) if all(need.allows(tp) for need in needs)][:8]


def padded(vocab: int) -> int:
    """The rows of a vocabulary as vLLM's layers pad it."""
    return -(-vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _vocabulary(program: Partitioned) -> list[Need]:
    """The ranks divide what vLLM pads a vocabulary to."""
    found = {}
    for block in program.all():
        for node in block.graph.nodes:
            if node.target not in (layers.vocab_embedding, layers.logits):
                continue
            table = node.args[1]
            at = table.meta["placement"]  # type: ignore[union-attr]
            if isinstance(at, Shard):
                why = f"a vocabulary is padded to a multiple of {VOCAB_MULTIPLE}, then divided"
                found[at] = Need(at.axis, padded(at.units), True, why, node.meta["where"])
    return list(found.values())


def _cuts_heads(program: Partitioned) -> bool:
    """Whether all attention is cut by heads: then its own demands say what divides."""
    kinds = (layers.attention, layers.latent_attention)
    calls = [n for b in program.all() for n in b.graph.nodes if n.target in kinds]
    return all(isinstance(n.meta["placement"], Shard) for n in calls)


def _query_heads(model: Model) -> int | None:
    found = config_of_fields(model).get("num_attention_heads")
    return found if isinstance(found, int) else None


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _demand(need: Need) -> str:
    if need.exact:
        return f"tp divides {need.axis}"
    return f"tp divides {need.axis} (split) or is a multiple of it (replicate)"


def _sizes(model: Model, needs: list[Need]) -> list[str]:
    """`num_attention_heads=9`: axes by the config's names for them, where it has them."""
    config = config_of_fields(model)
    out = []
    for axis, units in dict.fromkeys((n.axis, n.units) for n in needs):
        field = FIELD_OF_AXIS.get(axis, axis)
        declared = {
            n
            for param in model.by_path.values()
            for of, n in zip(param.axes, param.shape, strict=True)
            if of == axis
        }
        # What the engine pads is not what the user wrote.
        unpadded = [n for n in declared if padded(n) == units]
        wrote = unpadded[0] if unpadded and units not in declared else units
        size = f"{wrote}" if wrote == units else f"{wrote} (padded to {units})"
        out.append(f"{field if config.get(field) in (units, wrote) else axis}={size}")
    return out


def _paths(model: Model, axis: str) -> str:
    """The first parameter with an axis, with `*` for the index of its layer."""
    path = next(path for path, param in model.by_path.items() if axis in param.axes)
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
