"""`@block`: a pure function of a parameter subtree that the compiler keeps as one module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, overload

from funcmodels.ops.deferred import deferring
from funcmodels.remat import remat as remat_

F = TypeVar("F", bound=Callable[..., Any])


class Tracer(Protocol):
    """What records calls of blocks while a model is traced.

    One that has a method `call_recurrence` is given each `ops.recurrent` whole.
    """

    def call_block(
        self, fn: Callable[..., Any], args: tuple, kwargs: dict, *, remat: bool
    ) -> Any: ...


# The tracer at work, or None: then a block is its function and nothing else.
_tracer: Tracer | None = None


@overload
def block(fn: F) -> F: ...
@overload
def block(*, remat: bool) -> Callable[[F], F]: ...
def block(fn: Any = None, *, remat: bool = False) -> Any:
    """Mark a pure function as one module of the compiled model.

    Called while training, the function runs as written. Traced, each distinct (function, shapes,
    static arguments) is recorded once and becomes one `nn.Module` class, however many layers call
    it. Parameters may come in any argument, as tensors or pytrees of them; the first holds the
    block's own by convention.

    Args:
        fn: the function; or `@fm.block(remat=True)`.
        remat: keep a call's arguments alone for the backward pass, and compute what is inside it
            again there: less memory, for one more forward pass. Any transform may be around it.
    Raises:
        TraceError: with remat, the function uses a tensor that is no argument of its own.
    """
    if fn is None:
        return functools.partial(block, remat=remat)
    run = remat_(fn) if remat else fn

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _tracer is None:
            return run(*args, **kwargs)
        with deferring(False):  # the results of a module are tensors
            return _tracer.call_block(fn, args, kwargs, remat=remat)

    return call


def tracer() -> Tracer | None:
    """The tracer at work."""
    return _tracer


def set_tracer(tracer: Tracer | None) -> Tracer | None:
    """Install a tracer and return the one it replaces. For the compiler only."""
    global _tracer
    before, _tracer = _tracer, tracer
    return before
