"""A recurrence that a user writes as a function of one token, run over sequences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from funcmodels import tree
from funcmodels.block import tracer
from funcmodels.ops.recurrent_check import batch_dims_of, check_closure
from funcmodels.ops.recurrent_layout import Layout
from funcmodels.ops.recurrent_results import check_pair, check_results, check_state, shapes_said
from funcmodels.remat import remat as recomputed
from funcmodels.state import State

Carry = dict[str, Tensor]
Step = Callable[..., tuple[Carry, Any]]

CHUNK = 64
MOST_COMPILED = 8  # rounds of a loop that a graph of torch.compile may hold
BACKEND = "inductor"  # of the compiled loops of so many tokens


def recurrent(
    step: Step,
    state: State,
    xs: Any,
    *,
    params: Any = None,
    chunked: Step | None = None,
    chunk: int = CHUNK,
    segment_ids: Int[Tensor, "*batch seq"] | None = None,
    batch_dims: int | None = None,
    remat: bool = False,
    kernel: str | None = None,
) -> Any:
    """A scan over the tokens of each sequence: (state, x) -> (state, y), from the declared state.

    `step` says what the recurrence is, one token at a time, and is enough. `chunked` computes the
    same for several tokens at once, and is the fast form: `fm.check_recurrence` compares the two.
    Without it, each token is a step of its own, and costs its operations, however small: with some
    five, about 0.1 ms a token forwards and 0.2 ms with its gradient, for all sequences of a batch
    together. `torch.compile` makes a third of that. It leaves a loop of more than 8 tokens, or
    chunks, outside of its graph, as all chunks of packed rows, whose number depends on values; it
    compiles one function of 8 tokens, in some 10 s, once.

    Args:
        step: pure; of a state (dict of (*batch, *shape)) and one token's x (the leaves of xs
            without seq), the new state and a pytree y. Leading dims are written `...`. A tensor
            that it closes over is refused at once, one that it reaches through an object or
            another function when the model is compiled.
        state: see `fm.state`. It begins anew where segment_ids changes.
        xs: pytree of (*batch, seq, ...).
        params: a pytree that all tokens share, such as weights: given as a third argument to step
            and chunked where it is not None.
        chunked: as step, for x with a dim of any length in place of the token: (*batch, n, ...);
            the state is the one before the first of them, and the one returned that after the last.
        chunk: tokens that `chunked` is given at most.
        segment_ids: documents of packed rows, or None for one document in each row.
        batch_dims: how many dims of xs' leaves come before seq, where segment_ids do not tell.
            Found otherwise, once for a step and shapes, by trying `step` on the meta device:
            under `torch.compile`, outside of the graph.
        remat: let the backward pass keep the states between chunks alone, and compute the rest
            again in each chunk, as `fm.remat` does.
        kernel: what computes the same on the engine's own states, one of
            `compiler.recurrent_kernels`; the ready-made forms have one.
    Returns:
        The pytree of y: (*batch, seq, ...).
    Raises:
        ShapeError: leaves of xs that do not have one (*batch, seq), a step that changes the state's
            names, shapes or dtypes.
        TraceError: a step that uses a tensor which is not an argument.
    """
    for fn in (step, chunked):
        if fn is not None:
            check_closure(fn)
    record = getattr(tracer(), "call_recurrence", None)
    if record is not None:
        return record(
            step=step,
            state=state,
            xs=xs,
            params=params,
            chunked=chunked,
            chunk=chunk,
            segment_ids=segment_ids,
            kernel=kernel,
            remat=remat,
        )
    dims = batch_dims_of(step, state, xs, segment_ids, params, batch_dims)
    if remat and chunked is not None:
        chunked = recomputed(chunked)
    step, chunked = given(step, params), chunked and given(chunked, params)
    if torch.compiler.is_compiling():
        return scan(step, chunked, state, xs, dims, chunk, segment_ids)
    with shapes_said(chunked or step, state, xs):
        return scan(step, chunked, state, xs, dims, chunk, segment_ids)


def scan(
    step: Step,
    chunked: Step | None,
    state: State,
    xs: Any,
    dims: int,
    chunk: int,
    segment_ids: Tensor | None,
) -> Any:
    """Every y, by the chunked form where there is one; leaves have `dims` dims before seq."""
    carry = initial(state, xs, dims)
    starts = None if segment_ids is None else starts_of(segment_ids)
    seq = tree.leaves(xs)[0].shape[dims]
    if chunked is None:
        is_long = seq > MOST_COMPILED and torch.compiler.is_compiling()
        why = f"a loop of {seq} rounds"
        loop = _outside(by_some_tokens, why) if is_long else by_token
        return loop(step, state, carry, xs, dims, starts)[1]
    chunk = min(chunk, seq)
    if starts is None:
        return _loop(-(-seq // chunk))(chunked, state, carry, xs, dims, chunk)[1]
    loop = packed
    if torch.compiler.is_compiling():  # a graph would be of one number of chunks
        loop = _outside(packed, "how many chunks packed rows have depends on values")
    return loop(chunked, state, carry, xs, dims, chunk, starts)


def packed(
    chunked: Step, state: State, carry: Carry, xs: Any, dims: int, chunk: int, starts: Tensor
) -> Any:
    """Every y of rows whose documents begin where `starts` is true."""
    layout = Layout.of(starts, chunk)
    xs = tree.map(layout.spread, xs)
    ys = by_chunk(chunked, state, carry, xs, dims, chunk, layout.begins)[1]
    return tree.map(layout.collect, ys)


def _loop(chunks: int) -> Any:
    """`by_chunk`, of that many."""
    is_long = chunks > MOST_COMPILED and torch.compiler.is_compiling()
    return _outside(by_chunk, f"a loop of {chunks} rounds") if is_long else by_chunk


def _outside(loop: Any, why: str) -> Any:
    """A loop outside of a graph of `torch.compile`, which would hold each of its rounds.

    A round takes the compiler about a second.
    """
    return torch.compiler.disable(loop, reason=f"ops.recurrent: {why}")


def given(fn: Step, params: Any) -> Step:
    """A step of two arguments, with the name and the line of the one it is made of."""
    if params is None:
        return fn

    @functools.wraps(fn)
    def step(state: Carry, x: Any) -> tuple[Carry, Any]:
        return fn(state, x, params)

    return step


def initial(state: State, xs: Any, dims: int) -> Carry:
    """The state before the first token of each row."""
    some = tree.leaves(xs)[0]
    return state.initial(tuple(some.shape[:dims]), some.device)


def starts_of(segment_ids: Tensor) -> Tensor:
    """Where documents begin: (*batch, seq), bool."""
    first = torch.ones_like(segment_ids[..., :1], dtype=torch.bool)
    return torch.cat([first, segment_ids[..., 1:] != segment_ids[..., :-1]], dim=-1)


def by_token(
    step: Step, state: State, carry: Carry, xs: Any, dims: int, starts: Tensor | None = None
) -> tuple[Carry, Any]:
    """The state after all tokens, and every y: one step a token, anew where `starts` is true."""
    ys = []
    for t, x in enumerate(_parts(xs, lambda x: x.unbind(dims))):
        if starts is not None:
            carry = reset(state, carry, starts[..., t])
        result = step(carry, x)
        if t == 0:
            check_pair(step, result)
            check_state(step, state, result[0], carry)
            check_results(step, result[1], tree.leaves(x)[0].shape[:dims])
        carry, y = result
        ys.append(y)
    return carry, tree.map(lambda *y: torch.stack(y, dim=dims), *ys)


def by_some_tokens(
    step: Step, state: State, carry: Carry, xs: Any, dims: int, starts: Tensor | None
) -> tuple[Carry, Any]:
    """As `by_token`, by a compiled function of `MOST_COMPILED` tokens, whatever their number."""

    def some(carry: Carry, x: Any) -> tuple[Carry, Any]:
        return by_token(step, state, carry, x[0], dims, *x[1:])

    given = (xs,) if starts is None else (xs, starts)
    seq = tree.leaves(xs)[0].shape[dims]
    sizes = [seq - seq % MOST_COMPILED, seq % MOST_COMPILED]
    first, last = _parts(given, lambda x: x.split(sizes, dims))
    fast = torch.compile(some, dynamic=False, backend=BACKEND)
    carry, ys = by_chunk(fast, state, carry, first, dims, MOST_COMPILED)
    if not sizes[1]:
        return carry, ys
    carry, rest = some(carry, last)
    return carry, tree.map(lambda *y: torch.cat(y, dim=dims), ys, rest)


def by_chunk(
    chunked: Step,
    state: State,
    carry: Carry,
    xs: Any,
    dims: int,
    chunk: int,
    begins: Tensor | None = None,
) -> tuple[Carry, Any]:
    """As `by_token`, with several tokens at once; `begins` is true of chunks that begin anew."""
    ys = []
    for i, x in enumerate(_parts(xs, lambda x: x.split(chunk, dims))):
        if begins is not None:
            carry = reset(state, carry, begins[..., i])
        result = chunked(carry, x)
        if i == 0:
            some = tree.leaves(x)[0].shape
            check_pair(chunked, result)
            check_state(chunked, state, result[0], carry)
            check_results(chunked, result[1], some[:dims], some[dims])
        carry, y = result
        ys.append(y)
    return carry, tree.map(lambda *y: torch.cat(y, dim=dims), *ys)


def _parts(xs: Any, cut: Callable[[Tensor], Any]) -> Iterator[Any]:
    """The pytrees of the parts that every leaf is cut in.

    All at once: the gradient of a slice is as long as the whole, and there would be one a part.
    """
    leaves = [cut(leaf) for leaf in tree.leaves(xs)]
    for parts in zip(*leaves, strict=True):
        rest = iter(parts)
        yield tree.map(lambda x, rest=rest: next(rest), xs)


def reset(state: State, carry: Carry, where: Tensor) -> Carry:
    """The initial state in the rows where a document begins."""
    out = {}
    for name, value in carry.items():
        at = where.reshape(*where.shape, *[1] * (value.ndim - where.ndim))
        out[name] = torch.where(at, state.slots[name].init, value)
    return out
