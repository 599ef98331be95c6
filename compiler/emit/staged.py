"""What pipeline stages send to each other, where that is more than what a loop carries."""

from __future__ import annotations

from typing import Any

from compiler.emit.block import statements
from compiler.emit.text import call, quoted
from compiler.emit.whole import Whole
from compiler.ir import MODEL_DTYPE, Sym, tensor_type
from compiler.placement import Shard
from compiler.stages import Carried


class StageLines(Whole):
    """Writes it; the body's statements must have been written, for the names of variables."""

    @property
    def is_plain(self) -> bool:
        """Whether stages send on what a loop carries from layer to layer, and nothing else."""
        nodes = [value.node for value in self.root.carried]
        if self.root.loop is None or nodes != self.root.loop.results:
            return False
        shapes = {tensor_type(node).shape for node in nodes}
        cut = any(isinstance(node.meta.get("placement"), Shard) for node in nodes)
        return not cut and len(shapes) == 1 and len(*shapes) == 2

    def names_of_carried(self) -> list[str]:
        """The variables that stages send and receive."""
        return list(dict.fromkeys(self.body.names[value.node] for value in self.root.carried))

    def stage_constructor(self) -> list[str]:
        """The lines that say what a stage receives and sends."""
        rows: dict[tuple[str, ...], list[range]] = {}  # of one name and shape -> when
        for value in self.root.carried:
            rows.setdefault(self._row(value), []).append(value.to)
        lines = []
        for (name, *rest), ranges in rows.items():
            for to in _joined(ranges):
                when = f"range({to.start}, {to.stop})"
                lines.append(f"Carried({', '.join([quoted(name), when, *rest])})")
        return [
            *call(
                f"self.pipeline_stage = {self.module.help('Stage')}",
                ["self.start_layer", "self.end_layer", *lines],
                8,
            ),
            "        self.make_empty_intermediate_tensors = self.pipeline_stage.make_empty",
        ]

    def _row(self, value: Carried) -> tuple[str, ...]:
        node = value.node
        type_, at = tensor_type(node), node.meta.get("placement")
        shape: list[Any] = list(type_.shape[1:])
        axes = ["hidden"] if len(shape) == 1 else ["", "head_dim"]
        sizes = [self.module.size(axis, size) for axis, size in zip(axes, shape, strict=False)] + [
            str(size) for size in shape[len(axes) :]
        ]
        extra = []
        if isinstance(at, Shard):
            assert not isinstance(type_.shape[at.dim], Sym)
            units = self.module.size(at.axis, at.units)
            inner = shape[at.dim - 1] // at.units
            sizes[at.dim - 1] = units if inner == 1 else f"{units} * {inner}"
            extra.append(f"cut=({at.dim}, {units})")
        if type_.dtype != MODEL_DTYPE:
            self.module.use("torch")
            extra.append(f"dtype={type_.dtype}")
        return (self.body.names[node], *sizes, *extra)

    def first_stage(self) -> list[str]:
        """What the first stage begins with that only layers make."""
        if self.root.loop:
            return []
        made = {self.body.names[n] for n in self.root.before if n in self.body.names}
        return [f"        {name} = None" for name in self.names_of_carried() if name not in made]

    def received(self) -> list[str]:
        """What later stages begin with: None where none of the stage's layers reads it."""
        return [
            "            received = self.pipeline_stage.received(intermediate_tensors)",
            *(f'            {n} = received.get("{n}")' for n in self.names_of_carried()),
        ]

    def sent(self) -> list[str]:
        arguments = [f"{name}={name}" for name in self.names_of_carried()]
        return call("return self.pipeline_stage.sent", arguments, 12)

    def steps(self) -> list[str]:
        """The statements of each layer, in the stage that has it."""
        lines = []
        for i, step in enumerate(self.root.steps):
            nodes = [n for n in step if n not in self.root.local]
            indent = 12 if self.staged else 8
            if written := statements(self.body, nodes, indent):
                lines += [f"        if {i} in self.pipeline_stage.layers:"] if self.staged else []
                lines += written
        return lines


def _joined(ranges: list[range]) -> list[range]:
    """Ranges as few as can be."""
    out: list[range] = []
    for each in sorted(ranges, key=lambda r: r.start):
        if out and each.start <= out[-1].stop:
            out[-1] = range(out[-1].start, max(out[-1].stop, each.stop))
        else:
            out.append(each)
    return out
