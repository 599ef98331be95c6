"""What a run says: a progress bar, a JSONL file, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from funcmodels.atomic import write_file
from funcmodels.errors import TrainingError


class Log:
    """A context manager; each row goes to all that were asked for.

    Args:
        jsonl: appended to, a row a line. Rows after `step` are taken out first: a run that was
            killed had written them, and this one does the steps again.
        tensorboard: a folder, for the package `tensorboard`.
        progress: whether to show a bar; `console` is where.
    """

    def __init__(
        self,
        *,
        step: int,
        steps: int,
        jsonl: str | os.PathLike[str] | None,
        tensorboard: str | os.PathLike[str] | None,
        progress: bool,
        console: Console | None,
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._file: Any = None
        if jsonl is not None:
            _drop_after(Path(jsonl), step)
            # Line by line: of a killed run all is there but perhaps the end of the last row.
            self._file = Path(jsonl).open("a", buffering=1)  # noqa: SIM115 - closed with the rest
            self._stack.enter_context(self._file)
        self._board = _summary_writer(tensorboard, step) if tensorboard is not None else None
        text = TextColumn("{task.fields[said]}")
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not progress)
        self._task = self._bar.add_task("", total=steps, completed=step, said="training")
        self._last = time.monotonic()

    def __enter__(self) -> Log:
        self._stack.enter_context(self._bar)
        self._last = time.monotonic()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._board is not None:
            self._board.close()
        self._stack.close()

    def step(self, step: int, *, loss: float, grad_norm: float, tokens: int) -> None:
        """A training step that is done."""
        now = time.monotonic()
        rate, self._last = tokens / max(now - self._last, 1e-9), now
        memory = peak_memory()
        self.row(
            "step",
            step,
            loss=loss,
            grad_norm=grad_norm,
            tokens_per_second=round(rate, 1),
            peak_memory_bytes=memory,
        )
        said = f"loss {loss:.3f}  |grad| {grad_norm:.2f}  {memory / 2**30:.1f} GiB"
        said += f"  {rate:,.0f} tokens/s" if tokens else ""
        self._bar.update(self._task, completed=step, said=said)

    def row(self, kind: str, step: int, **values: Any) -> None:
        """A row; the numbers in it are drawn by TensorBoard."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def not_training(self) -> None:
        """Leave the time since the last step out of the next one's tokens per second."""
        self._last = time.monotonic()


def peak_memory() -> int:
    """The most bytes there were: allocated on the CUDA device, or resident in the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _drop_after(path: Path, step: int) -> None:
    """Rows up to a step, in one replacement of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_file(path, "".join(kept).encode())


def _summary_writer(folder: str | os.PathLike[str], step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError(
            "TensorBoard is not installed",
            got=f"tensorboard={str(folder)!r}",
            fix="pip install 'funcmodels[tensorboard]', or log='run.jsonl'",
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1)
