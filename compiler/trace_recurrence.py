"""How recurrences are recorded: a step, its chunked form and what a scan combines by are blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from compiler import refuse, transforms
from compiler.associative import Combine, associative
from compiler.ir import Sym, dtype_name
from compiler.recurrence import Recurrence, recurrence
from funcmodels import tree
from funcmodels.ops.recurrent_results import (
    check_alike,
    check_combined,
    check_pair,
    check_results,
    check_state,
    not_of_all,
    shapes_said,
)
from funcmodels.state import State

if TYPE_CHECKING:
    from compiler.trace import _Recorded, _Tracer


def record_recurrence(
    tracer: _Tracer,
    *,
    step: Callable[..., Any],
    state: State,
    xs: Any,
    params: Any,
    chunked: Callable[..., Any] | None,
    chunk: int,
    segment_ids: Tensor | None,
    kernel: str | None,
    remat: bool = False,
) -> Any:
    """Record a recurrence: its step and its chunked form, each as a block of its own."""
    tracer._check_branches()
    if transforms.is_transforming():
        raise refuse.recurrence_in_transform(step)
    given = pytree.tree_leaves(xs)
    shared = [] if params is None else pytree.tree_leaves(params)
    with torch._C.DisableTorchFunction():
        _check_tokens(tracer, step, given)
        sizes = given[0].shape[: len(tracer.dims)]
        of_one = _step_arguments(
            tracer, state, tree.map(partial(_without_seq, tracer), xs), params, sizes[:1]
        )
        of_many = _step_arguments(tracer, state, tree.map(tracer._alike, xs), params, sizes[:-1])
    lead = tuple(map(Sym, tracer.dims))
    with shapes_said(step, state, xs):
        one = _record_step(tracer, step, state, of_one, lead[:1])
    with shapes_said(chunked or step, state, xs):
        many = chunked and _record_step(tracer, chunked, state, of_many, lead, (step, one))
    made = Recurrence(one.block, many and many.block, state, chunk, kernel, remat=remat)
    args = tracer._as_nodes((tuple(given), tuple(shared), segment_ids), step)
    with torch._C.DisableTorchFunction():
        results = [_with_seq(tracer, t, given[0]) for t in one.tensors[len(state.slots) :]]
        node = tracer._node("call_function", recurrence, tuple(results), args, {"recurrence": made})
        tracer._bind(node, results)
    tracer.scopes[-1].keep += results
    rest = iter(results)
    return tree.map(lambda _: next(rest), pytree.tree_unflatten(one.leaves, one.spec)[1])


def _check_tokens(tracer: _Tracer, step: Callable[..., Any], xs: list[Any]) -> None:
    want = tuple(map(Sym, tracer.dims))
    for x in xs:
        if not isinstance(x, Tensor) or tracer._type(x).shape[: len(want)] != want:
            raise refuse.not_of_tokens(step, tracer._type(x) if isinstance(x, Tensor) else x)


def _without_seq(tracer: _Tracer, x: Tensor) -> Tensor:
    """What a step is recorded on: one token of each of some sequences, (sequences, ...)."""
    return tracer._alike(x) if len(tracer.dims) == 1 else tracer._alike(x.select(1, 0))


def _with_seq(tracer: _Tracer, y: Tensor, like: Tensor) -> Tensor:
    """A result of a step as one of all tokens."""
    if len(tracer.dims) == 1:
        return tracer._alike(y)
    return tracer._alike(y.unsqueeze(1).expand(*like.shape[:2], *y.shape[1:]))


def _step_arguments(
    tracer: _Tracer, state: State, xs: Any, params: Any, batch: Any
) -> tuple[Any, ...]:
    """Tensors for a step to be recorded on, which are no others' of the model."""
    carry = {
        name: torch.empty((*batch, *slot.shape), dtype=slot.dtype)
        for name, slot in state.slots.items()
    }
    return (carry, xs) if params is None else (carry, xs, tree.map(tracer._alike, params))


def _record_step(
    tracer: _Tracer,
    fn: Callable[..., Any],
    state: State,
    args: tuple,
    lead: tuple[Sym, ...],
    of: tuple[Callable[..., Any], _Recorded] | None = None,
) -> _Recorded:
    """Record a step, or the chunked form `of` one.

    Its results are the state's tensors as declared and the leaves of y, a chunked form's in
    the order of its step's: what becomes of them goes by their places.

    Args:
        lead: the first dims of each leaf of y.
    """

    def arranged(result: Any) -> Any:
        with torch._C.DisableTorchFunction():
            check_pair(fn, result)
            after, y = result
            check_state(fn, state, after, args[0])
            check_results(fn, y, ())
            kinds = _kinds_of(tracer, fn, y, lead)
            if of is not None:
                step, recorded = of
                like = pytree.tree_unflatten(recorded.leaves, recorded.spec)[1]
                check_alike(step, fn, _kinds_of(tracer, step, like, lead[:1]), kinds)
                y = tree.unflatten(like, dict(tree.items(y)))
        return {name: after[name] for name in state.slots}, y

    return _record_inner(tracer, fn, args, arranged)


def _record_inner(
    tracer: _Tracer,
    fn: Callable[..., Any],
    args: tuple,
    arranged: Callable[[Any], Any],
    *names: str,
) -> _Recorded:
    """Record what is no module, but runs within one."""
    before, tracer.in_step = tracer.in_step, True
    try:
        spec = pytree.tree_flatten((args, {}))
        return tracer._record(fn, *spec, arranged=arranged, names=list(names))
    finally:
        tracer.in_step = before


def _kinds_of(
    tracer: _Tracer, fn: Callable[..., Any], y: Any, lead: tuple[Sym, ...]
) -> dict[str, Any]:
    """By path, dtype and shape of one token's results."""
    kinds = {}
    for path, leaf in tree.items(y):
        found = tracer._type(leaf)
        if found.shape[: len(lead)] != lead:
            n = None if len(lead) == 1 and tracer.dims == ("batch", "seq") else lead[-1]
            raise not_of_all(fn, path, found.shape, n)
        kinds[path] = dtype_name(found.dtype), found.shape[len(lead) :]
    return kinds


def record_scan(tracer: _Tracer, combine: Callable[..., Any], xs: Any, dim: int) -> Any:
    """Record a scan over the tokens: what it combines by is a block of its own."""
    tracer._check_branches()
    if transforms.is_transforming():
        raise refuse.recurrence_in_transform(combine)
    given = pytree.tree_leaves(xs)
    with torch._C.DisableTorchFunction():
        _check_tokens(tracer, combine, given)
        at = len(tracer.dims) - 1
        if any(dim % x.ndim != at for x in given):
            raise refuse.not_of_tokens(combine, f"dim={dim}")
        first, second = (tree.map(tracer._alike, xs) for _ in range(2))
    paths = [path.replace(".", "_") for path, _ in tree.items(xs)]
    names = [f"{x}_{path}".strip("_") for x in ("first", "second") for path in paths]

    def arranged(result: Any) -> Any:
        with torch._C.DisableTorchFunction():
            check_combined(combine, result, xs)
            return tree.unflatten(xs, dict(tree.items(result)))

    made = Combine(_record_inner(tracer, combine, (first, second), arranged, *names).block)
    args = tracer._as_nodes((tuple(given),), combine)
    with torch._C.DisableTorchFunction():
        results = [tracer._alike(x) for x in given]
        settings = {"combine": made, "dim": at}
        node = tracer._node("call_function", associative, tuple(results), args, settings)
        tracer._bind(node, results)
    tracer.scopes[-1].keep += results
    rest = iter(results)
    return tree.map(lambda _: next(rest), xs)
