"""The errors users meet: what failed and where, what was got, what is needed, and the fix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

MAX_NAMES = 5


class FuncModelsError(ValueError):
    """Base of every error a user can cause.

    Args:
        what: first line, what failed and where.
        got, need, from_, fix: the lines below it, printed in this order; None leaves one out.
        **lines: further labelled lines, printed between `need` and `from`.
    """

    def __init__(
        self,
        what: str,
        *,
        got: str | None = None,
        need: str | None = None,
        from_: object | None = None,
        fix: str | None = None,
        **lines: object,
    ) -> None:
        self.what = what
        self.lines = {"got": got, "need": need, **lines, "from": from_, "fix": fix}
        super().__init__(self._text())

    def say_where(self, where: object) -> None:
        """Name a line, unless one is named already."""
        if self.lines["from"] is None:
            self.lines["from"] = where
            self.args = (self._text(),)

    def _text(self) -> str:
        rows = [(label, value) for label, value in self.lines.items() if value is not None]
        width = max((len(label) for label, _ in rows), default=0) + 1
        below = [f"  {label + ':':<{width}} {_indented(value, width)}" for label, value in rows]
        return "\n".join([f"{type(self).__name__}: {self.what}", *below])


class ShapeError(FuncModelsError):
    """An operation was given tensors whose shapes do not fit each other."""


class KernelError(FuncModelsError):
    """A kernel that was asked for by name cannot do what it was asked."""


class DeclarationError(FuncModelsError):
    """A parameter, an axis or a model is declared in a way that cannot work."""


class ShardingError(FuncModelsError):
    """A sharding table or a mesh size does not fit the model."""


class TaskError(FuncModelsError):
    """A model is asked for what it was not declared for."""


class ConfigError(FuncModelsError):
    """A config.json holds a field or a value that the model file does not support."""


class CheckpointError(FuncModelsError):
    """The tensors of a checkpoint are not the parameters of the model."""


class TrainingError(FuncModelsError):
    """Training is set up in a way that cannot work, or cannot go on."""


class NotFiniteError(TrainingError):
    """A loss or a gradient is NaN or infinite: `step` and `batch` are those that made it so."""

    step: int
    batch: Any


class TraceError(FuncModelsError):
    """A forward function does something that cannot be recorded as a pure graph."""


class LoweringError(FuncModelsError):
    """A recorded operation cannot be lowered to the target in the way that was asked for."""


class VerifyError(FuncModelsError):
    """A graph breaks a rule of the intermediate representation: a bug of the compiler."""


def listed(names: Sequence[str] | Iterable[str]) -> str:
    """At most five names, then a count of the rest."""
    names = list(names)
    if len(names) <= MAX_NAMES:
        return ", ".join(names) or "none"
    return ", ".join(names[:MAX_NAMES]) + f", ... and {len(names) - MAX_NAMES} more"


def _indented(value: object, width: int) -> str:
    """The value with its further lines under its first."""
    return str(value).replace("\n", "\n" + " " * (width + 3))
