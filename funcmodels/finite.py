"""What a loss that is NaN or infinite comes from: the failing step again, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcmodels import tree
from funcmodels.block import Tracer, set_tracer
from funcmodels.errors import NotFiniteError
from funcmodels.source import SourceLine


def is_finite(value: Any) -> bool:
    """Whether every floating-point tensor of a tree has only numbers in it."""
    return all(
        bool(torch.isfinite(leaf).all())
        for leaf in tree.leaves(value)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )


def first_not_finite(
    weights: Any, batch: Any, loss: Callable[[Any, Any], Tensor]
) -> tuple[str, str | None]:
    """Run a loss once more, and say what in it is not finite first.

    Returns:
        A sentence, and the line of the user's code where there is one: a parameter, the first
        block whose output is not finite, or what comes after the blocks.
    """
    for path, leaf in tree.items(weights):
        if not is_finite(leaf):
            return f"the parameter {path}, before anything is computed", None
    watch = _Watch({id(leaf): path for path, leaf in tree.items(weights)})
    before = set_tracer(watch)
    try:
        with torch.no_grad():
            value = loss(weights, batch)
    except _Found:
        assert watch.found is not None
        return watch.found
    finally:
        set_tracer(before)
    if is_finite(value):
        return "nothing in the forward pass: a second run of it is finite", None
    return f"what is computed after the last of {len(watch.calls)} block calls", None


def not_finite_gradients(grads: Any) -> str:
    """The parameters whose gradient has a NaN or an infinity in it."""
    paths = [path for path, leaf in tree.items(grads) if not is_finite(leaf)]
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"the gradient of {paths[-1]}{more}, in the backward pass" if paths else "the norm alone"


class _Found(Exception):  # noqa: N818 - it ends the second run, and is no error
    """The second run need not go on."""


@dataclass
class _Watch(Tracer):
    """Looks at the output of every call of a block; the innermost block returns first."""

    paths: dict[int, str]  # id of a parameter -> its path
    calls: list[str] = field(default_factory=list)
    found: tuple[str, str | None] | None = None

    def call_block(self, fn: Callable[..., Any], args: tuple, kwargs: dict, *, remat: bool) -> Any:
        self.calls.append(fn.__name__)
        number = self.calls.count(fn.__name__)
        output = fn(*args, **kwargs)
        if not is_finite(output):
            bad = "" if is_finite((args, kwargs)) else ", which was given values that are not"
            where = self._where((args, kwargs))
            self.found = (f"block {fn.__name__}{where}, its call {number}{bad}", str(_line_of(fn)))
            raise _Found
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


def _line_of(fn: Callable[..., Any]) -> SourceLine:
    code = fn.__code__
    return SourceLine(code.co_filename, code.co_firstlineno, fn.__name__)


def refuse(
    what: str, step: int, batch: Any, position: Any, cause: tuple[str, str | None]
) -> NotFiniteError:
    """The error that stops training."""
    tensors = ((path, leaf) for path, leaf in tree.items(batch) if isinstance(leaf, Tensor))
    sizes = ", ".join(f"{path} {tuple(leaf.shape)}" for path, leaf in tensors)
    error = NotFiniteError(
        f"{what} at step {step}",
        got=f"first not finite: {cause[0]}",
        batch=f"number {position} of the data: {sizes}; it is error.batch",
        from_=cause[1],
        fix="a smaller learning rate, a longer warm-up, clip=1.0, or other data; "
        "the weights of the last checkpoint are from before this step",
    )
    error.step, error.batch = step, batch
    return error
