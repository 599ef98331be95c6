"""The result of `fm.explain`: what became of a model, to print, to keep and to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from compiler.explain.padding import HeadPadding
from compiler.explain.records import BlockView, Parameter, Stage, Step
from compiler.explain.roofline import Estimate
from compiler.shown import shown
from funcmodels.atomic import write_file


@dataclass(frozen=True)
class Explanation:
    """What becomes of a model on each rank. Print it, or see `to_json` and `to_html`.

    Args:
        model, num_parameters: its name and size.
        tp, ep, pp: ranks that share each layer, that share the experts, and pipeline stages.
        dtype, kv_dtype: of the weights that declare none of their own, and of the KV cache.
        blocks: of the served model, callers first; each is told once, with its modules.
        stages: the totals of one rank of each pipeline stage.
        unread: the paths of parameters that forward does not read: they are not served.
        estimate: times on a device, where one was named.
        head_padding: what heads of zeros cost, where `fm.pad_heads` made the model.
    """

    model: str
    num_parameters: int
    tp: int
    ep: int
    pp: int
    dtype: str
    kv_dtype: str
    blocks: tuple[BlockView, ...]
    stages: tuple[Stage, ...]
    unread: tuple[str, ...] = ()
    estimate: Estimate | None = None
    head_padding: HeadPadding | None = None

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter, those of a layer for all layers together."""
        return tuple(p for block in self.blocks for p in block.parameters)

    @property
    def plain(self) -> tuple[tuple[BlockView, Step], ...]:
        """The operations left in plain torch, but for views; each with its block."""
        return tuple(found for found in self._steps() if found[1].kind == "plain")

    @property
    def collectives(self) -> tuple[tuple[BlockView, Step], ...]:
        """The operations that make ranks wait for each other, each with its block."""
        return tuple(found for found in self._steps() if found[1].collective is not None)

    @property
    def weights(self) -> int:
        """Bytes of weights on the fullest rank."""
        return max(stage.weights for stage in self.stages)

    @property
    def kv_per_token(self) -> int:
        """Bytes of KV cache for each token on the fullest rank."""
        return max(stage.kv_per_token for stage in self.stages)

    @property
    def state_per_sequence(self) -> int:
        """Bytes of recurrent states for each sequence on the fullest rank."""
        return max(stage.state_per_sequence for stage in self.stages)

    def _steps(self) -> Iterator[tuple[BlockView, Step]]:
        yield from ((block, step) for block in self.blocks for step in block.steps)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it: blocks with their parameters and steps, stages, times."""
        found = asdict(self)
        found["weights"], found["kv_per_token"] = self.weights, self.kv_per_token
        found["state_per_sequence"] = self.state_per_sequence
        if self.estimate is not None:
            for name in ("prefill", "decode"):
                phase = getattr(self.estimate, name)
                found["estimate"][name] |= {
                    "bound": phase.bound,
                    "tokens_per_second": phase.tokens_per_second,
                }
        return found

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one page that stands alone: the block diagram, and the tables below it."""
        from compiler.explain.page import page

        path = Path(path)
        write_file(path, page(self).encode())
        return path

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from compiler.explain.tables import tables

        yield from tables(self)

    def __str__(self) -> str:
        return shown(self)
