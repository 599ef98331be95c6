"""What a loss that is NaN or infinite comes from: the failing step again, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcmodels import tree
from funcmodels.block import Tracer, set_tracer, tracer
from funcmodels.errors import NotFiniteError
from funcmodels.source import SourceLine


def is_finite(value: Any) -> bool:
    """Whether every floating-point tensor of a tree has only numbers in it."""
    return all(
        bool(torch.isfinite(leaf).all())
        for leaf in tree.leaves(value)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )


@dataclass(frozen=True)
class Found:
    """What is not finite first.

    Args:
        what: a sentence: a parameter, a block, or what comes after the blocks.
        line: of the user's code, where there is one.
        at: how many calls of blocks had returned before: the same number on all processes.
    """

    what: str
    line: str | None = None
    at: float = math.inf


def first_not_finite(
    weights: Any, batch: Any, loss: Callable[[Any, Any], Tensor], *, stops: bool = True
) -> Found:
    """Run a loss once more, and say what in it is not finite first.

    Args:
        stops: end the second run there. Processes of a mesh must not: others wait for them.
    """
    watch = Watch({id(leaf): path for path, leaf in tree.items(weights)}, stops=stops)
    for path, leaf in tree.items(weights):
        if not is_finite(leaf):
            watch.found = Found(f"the parameter {path}, before anything is computed", None, -1)
            if stops:
                return watch.found
            break
    before = set_tracer(watch)
    try:
        with torch.no_grad():
            value = loss(weights, batch)
    except _Stop:
        assert watch.found is not None
        return watch.found
    finally:
        set_tracer(before)
    if watch.found is not None:
        return watch.found
    if is_finite(value):
        return Found("nothing in the forward pass: a second run of it is finite")
    return Found(f"what is computed after the last of {len(watch.calls)} block calls", None, 1e9)


def not_finite_gradients(grads: Any) -> list[str]:
    """The parameters whose gradient has a NaN or an infinity in it, by path."""
    return [path for path, leaf in tree.items(grads) if not is_finite(leaf)]


def of_gradients(paths: list[str]) -> Found:
    """The same as a cause: the last parameter's gradient was made first."""
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    what = f"the gradient of {paths[-1]}{more}, in the backward pass" if paths else "the norm alone"
    return Found(what)


def why_not_finite(
    loss_value: float, grads: Any, weights: Any, batch: Any, loss: Callable[[Any, Any], Tensor]
) -> Found:
    """What a loss, or a gradient, that is not finite comes from, on one process."""
    if math.isfinite(loss_value):
        return of_gradients(not_finite_gradients(grads))
    return first_not_finite(weights, batch, loss)


class _Stop(Exception):  # noqa: N818 - it ends the second run, and is no error
    """The second run need not go on."""


@dataclass
class Watch(Tracer):
    """Looks at the output of every call of a block; the innermost block returns first."""

    paths: dict[int, str]  # id of a parameter -> its path
    stops: bool = True
    calls: list[str] = field(default_factory=list)
    returned: int = 0
    found: Found | None = None

    def call_block(self, fn: Callable[..., Any], args: tuple, kwargs: dict, *, remat: bool) -> Any:
        return self.around(fn, (args, kwargs), lambda: fn(*args, **kwargs))

    def around(self, fn: Callable[..., Any], given: Any, run: Callable[[], Any]) -> Any:
        """Run a call of a block, the user's function `fn`, and look at what it returns."""
        self.calls.append(fn.__name__)
        number = self.calls.count(fn.__name__)
        output = run()
        if self.found is None and not is_finite(output):
            bad = "" if is_finite(given) else ", which was given values that are not"
            what = f"block {fn.__name__}{self._where(given)}, its call {number}{bad}"
            self.found = Found(what, str(_line_of(fn)), self.returned)
            if self.stops:
                raise _Stop
        self.returned += 1
        return output

    def _where(self, given: Any) -> str:
        """The subtree of parameters that a call was given, as ` of layers.3.attn`."""
        paths = [self.paths[id(x)].split(".") for x in tree.leaves(given) if id(x) in self.paths]
        common = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return f" of {'.'.join(common)}" if common else ""


def watching() -> Watch | None:
    """The watch at work, for what calls blocks that are no longer the user's functions."""
    found = tracer()
    return found if isinstance(found, Watch) else None


def _line_of(fn: Callable[..., Any]) -> SourceLine:
    code = fn.__code__
    return SourceLine(code.co_filename, code.co_firstlineno, fn.__name__)


def refuse(what: str, step: int, batch: Any, position: Any, cause: Found) -> NotFiniteError:
    """The error that stops training."""
    tensors = ((path, leaf) for path, leaf in tree.items(batch) if isinstance(leaf, Tensor))
    sizes = ", ".join(f"{path} {tuple(leaf.shape)}" for path, leaf in tensors)
    error = NotFiniteError(
        f"{what} at step {step}",
        got=f"first not finite: {cause.what}",
        batch=f"number {position} of the data: {sizes}; it is error.batch",
        from_=cause.line,
        fix="a smaller learning rate, a longer warm-up, clip=1.0, or other data; "
        "the weights of the last checkpoint are from before this step",
    )
    error.step, error.batch = step, batch
    return error
