"""What an optimiser is, and how the algorithms of this folder run: by formula or by kernel.

An algorithm is written twice. Its *rule* is the formula for one tensor, without side effects: it
runs under `torch.func` (so a step can be differentiated, or batched), under `torch.compile`, which
fuses it, and on any device. Its *kernel* is torch's own, on lists of tensors and in place; it runs
otherwise, on the tensors themselves where they are donated, on copies where they are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingImports]
from torch._subclasses.fake_tensor import is_fake

from funcmodels import tree
from funcmodels.errors import TrainingError
from funcmodels.optim.arguments import NOT_NEGATIVE, RATE, check_number, check_state_dtype
from funcmodels.optim.masks import Mask, Matching, all_paths, check_mask
from funcmodels.optim.schedules import Schedule

# Where torch has the kernels that this folder calls; elsewhere the rules run.
KERNEL_DEVICES = ("cpu", "cuda")
# Bytes of weights that one call of a kernel works on, which bounds what it needs beside them.
CHUNK = 1 << 26


class Update(Protocol):
    def __call__(
        self, grads: Any, state: Any, weights: Any, *, donate: bool = False
    ) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Optimizer:
    """A pair of functions, as in optax.

    Args:
        init: weights -> the state before the first step, a pytree of tensors.
        update: (grads, state, weights) -> (new weights, new state). With `donate=True` the weights
            and the state given are overwritten, and may be the ones returned: a step then needs no
            second copy of them, and neither the old ones nor the gradients may be used again.
        elementwise: whether the step of an element depends on that element alone, so that a process
            may do it that holds a part of a parameter.
        asks: whether its update asks `parts()` for what else it needs where there are parts; see
            `fm.optim.sharded`.
    """

    init: Callable[[Any], Any]
    update: Update
    elementwise: bool = True
    asks: bool = False


class Hyper(NamedTuple):
    """What a rule and a kernel are told beside the tensors."""

    rate: float | Tensor  # the learning rate of this step
    step: Tensor  # of this update, from 1; () int64, on the CPU
    weight_decay: float


class Rule(Protocol):
    """The formula for one tensor: (weight, gradient, its state) -> (weight, its state)."""

    def __call__(
        self, path: str, w: Tensor, g: Tensor, state: tuple[Tensor, ...], hyper: Hyper
    ) -> tuple[Tensor, tuple[Tensor, ...]]: ...


class Kernel(Protocol):
    """The same, in place, on lists of tensors of one device and dtype; a list for each state."""

    def __call__(
        self,
        paths: list[str],
        ws: list[Tensor],
        gs: list[Tensor],
        states: tuple[list[Tensor], ...],
        hyper: Hyper,
    ) -> None: ...


def optimizer_of(
    what: str,
    slots: tuple[str, ...],
    rule: Rule,
    kernel: Kernel,
    *,
    lr: float | Schedule,
    weight_decay: float,
    decay: Mask | None,
    state_dtype: torch.dtype | None,
    elementwise: bool = True,
    asks: bool = False,
) -> Optimizer:
    """An optimiser whose state is the step and, for each slot, a tree like the weights, of zeros.

    Args:
        what: its name in `fm.optim`.
        decay: the parameters that `weight_decay` is for; None means all.
        state_dtype: of the state; None means that of each weight. A step is computed in the wider
            of the two, and rounded when it is stored.
    Raises:
        TrainingError: an argument is out of its range.
    """
    if not callable(lr):
        check_number(what, "lr", lr, RATE)
    check_number(what, "weight_decay", weight_decay, NOT_NEGATIVE)
    check_state_dtype(what, state_dtype)
    check_mask(decay)

    def init(weights: Any) -> dict[str, Any]:
        if isinstance(decay, Matching) and weight_decay:
            decay.check(all_paths(weights))
        zeros = functools.partial(torch.zeros_like, dtype=state_dtype, requires_grad=False)
        state: dict[str, Any] = {name: tree.map(zeros, weights) for name in slots}
        return {"step": torch.zeros((), dtype=torch.int64), **state}

    def update(
        grads: Any, state: Any, weights: Any, *, donate: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        _check(grads, state, weights, slots)
        step = state["step"] + 1
        rate = _rate(lr, state["step"])
        every = [
            _Leaf(path, w, g, states, weight_decay if decay is None or decay(path, w) else 0.0)
            for (path, w), g, *states in zip(
                tree.items(weights),
                tree.leaves(grads),
                *(tree.leaves(state[name]) for name in slots),
                strict=True,
            )
        ]
        run = _by_rule if _needs_rule(every, step) else _by_kernel
        run(every, rule, kernel, rate, step, donate)
        if donate:  # all was written in place
            return weights, {**state, "step": step}
        new = iter([leaf.w for leaf in every])
        states = {}
        for i, name in enumerate(slots):
            slot = iter([leaf.states[i] for leaf in every])
            states[name] = tree.map(lambda _, slot=slot: next(slot), weights)
        return tree.map(lambda _: next(new), weights), {"step": step, **states}

    return Optimizer(init, update, elementwise, asks)


@dataclass
class _Leaf:
    """A parameter on its way through a step."""

    path: str
    w: Tensor
    g: Tensor
    states: list[Tensor]
    weight_decay: float

    @property
    def dtype(self) -> torch.dtype:
        """The widest of what is stored."""
        dtypes = [self.w.dtype, *(state.dtype for state in self.states)]
        return functools.reduce(torch.promote_types, dtypes)


def _by_rule(
    every: list[_Leaf], rule: Rule, _: Kernel, rate: float | Tensor, step: Tensor, donate: bool
) -> None:
    """Each tensor by the formula, in float32 at least."""
    for leaf in every:
        dtype = torch.promote_types(leaf.dtype, torch.float32)  # as torch's kernels compute
        states = tuple(state.to(dtype) for state in leaf.states)
        hyper = Hyper(rate, step, leaf.weight_decay)
        w, states = rule(leaf.path, leaf.w.to(dtype), leaf.g.to(dtype), states, hyper)
        new = [x.to(old.dtype) for x, old in zip((w, *states), (leaf.w, *leaf.states), strict=True)]
        if donate:
            with torch.no_grad():
                new = [o.copy_(x) for o, x in zip((leaf.w, *leaf.states), new, strict=True)]
        leaf.w, *leaf.states = new


@torch.no_grad()
def _by_kernel(
    every: list[_Leaf], _: Rule, kernel: Kernel, rate: float | Tensor, step: Tensor, donate: bool
) -> None:
    """All tensors by torch's kernels, chunk by chunk."""
    for leaf in every:
        if not donate:
            leaf.w = leaf.w.detach().clone()
            leaf.states = [state.clone() for state in leaf.states]
    for chunk in _chunks(every):
        paths = [leaf.path for leaf in chunk]
        ws = [_plain(leaf.w, leaf.dtype) for leaf in chunk]
        gs = [_beside(leaf.g.detach(), w) for leaf, w in zip(chunk, ws, strict=True)]
        each = [[_beside(x, w) for x in leaf.states] for leaf, w in zip(chunk, ws, strict=True)]
        states = tuple(list(slot) for slot in zip(*each, strict=True))
        kernel(paths, ws, gs, states, Hyper(rate, step, chunk[0].weight_decay))
        for leaf, w, own in zip(chunk, ws, each, strict=True):
            for old, new in zip((leaf.w, *leaf.states), (w, *own), strict=True):
                if old is not new:  # a copy was worked on
                    old.copy_(new)


def _plain(w: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as a kernel can have it: of the dtype, and all of a piece of memory."""
    dense = torch.empty_like(w, device="meta").stride() == w.stride()
    return w.to(dtype) if dense else torch.empty_like(w, dtype=dtype).copy_(w)


def _beside(x: Tensor, w: Tensor) -> Tensor:
    """A tensor laid out in memory as its weight, for the kernels go through both in that order.

    Gradients often are not: that of a product may come out transposed.
    """
    same = x.dtype == w.dtype and x.stride() == w.stride()
    return x if same else torch.empty_like(w).copy_(x)


def _chunks(every: Sequence[_Leaf]) -> Iterator[list[_Leaf]]:
    """Lists for one call: of one device, dtype and weight decay, and not too many bytes."""
    groups: dict[tuple, list[_Leaf]] = {}
    for leaf in every:
        groups.setdefault((leaf.w.device, leaf.dtype, leaf.weight_decay), []).append(leaf)
    for group in groups.values():
        chunk: list[_Leaf] = []
        used = 0
        for leaf in group:
            if chunk and used + leaf.w.nbytes > CHUNK:
                yield chunk
                chunk, used = [], 0
            chunk.append(leaf)
            used += leaf.w.nbytes
        yield chunk


def _needs_rule(every: Sequence[_Leaf], step: Tensor) -> bool:
    """Whether torch's kernels cannot be used: they run on real tensors, and have no derivative."""
    if torch.compiler.is_compiling():
        return True
    tensors = [step, *(x for leaf in every for x in (leaf.w, leaf.g, *leaf.states))]
    return any(is_fake(x) or is_transformed(x) for x in tensors) or any(
        leaf.w.device.type not in KERNEL_DEVICES for leaf in every
    )


def is_transformed(x: Tensor) -> bool:
    """Whether a tensor is inside `torch.func.grad`, `vmap`, `jvp` or alike."""
    return not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(x)


def _rate(lr: float | Schedule, step: Tensor) -> float | Tensor:
    """The learning rate: a number where its value is at hand, which kernels take as it is."""
    if not callable(lr):
        return lr
    rate = lr(step)
    known = isinstance(rate, Tensor) and not (
        torch.compiler.is_compiling() or is_fake(rate) or is_transformed(rate)
    )
    return float(rate) if known else rate


def _check(grads: Any, state: Any, weights: Any, slots: tuple[str, ...]) -> None:
    """The trees belong together, and every parameter has a gradient of its shape."""
    if torch.compiler.is_compiling():  # guards of the compiler fix the structure already
        return
    structure = tree.structure(weights)
    for name, other in (("the gradients", grads), *((f'state["{s}"]', state[s]) for s in slots)):
        if tree.structure(other) != structure:
            paths, got = dict(tree.items(weights)), dict(tree.items(other))
            first = next(
                (p for p in (*paths, *got) if (p in paths) != (p in got)), "the containers"
            )
            raise TrainingError(
                f"{name} and the weights are different trees",
                got=f"{len(got)} leaves, and {len(paths)} weights; the first to differ: {first}",
                need="trees of one structure",
                fix="state = optimizer.init(weights), with the weights that are trained",
            )
    for i, (w, g) in enumerate(zip(tree.leaves(weights), tree.leaves(grads), strict=True)):
        if not isinstance(g, Tensor) or g.shape != w.shape:
            path = [path for path, _ in tree.items(weights)][i]
            raise TrainingError(
                f"the gradient of {path} does not fit it",
                got=f"{tuple(g.shape)}" if isinstance(g, Tensor) else repr(g),
                need=f"a tensor of shape {tuple(w.shape)}",
                fix="fm.optim.partition({...: fm.optim.frozen()}) leaves parameters as they are",
            )
