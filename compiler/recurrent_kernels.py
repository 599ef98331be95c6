"""Which kernels of the engine compute a recurrence, and how its operands must be cut for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compiler.placement import REPLICATE, Placement, Shard
from compiler.recurrence import Recurrence


@dataclass(frozen=True)
class Kernel:
    """A class of `vllm_recurrent_kernels` that runs a recurrence on the engine's states in place.

    Each dim below is the one whose parts a kernel treats apart, as heads or channels: what is cut
    there on all operands alike is a smaller problem of the same kind.

    Args:
        helper: the class.
        state, xs, params: that dim of each tensor, counted without batch and tokens; fewer params
            may be given.
    """

    helper: str
    state: tuple[int, ...]
    xs: tuple[int, ...]
    params: tuple[int, ...]


KERNELS = {
    "short_conv": Kernel("ShortConvKernel", state=(1,), xs=(0,), params=(0, 0)),
    "delta_rule": Kernel("DeltaRuleKernel", state=(0,), xs=(0,) * 5, params=()),
    "unit_delta_rule": Kernel("UnitDeltaRuleKernel", state=(0,), xs=(0,) * 5, params=()),
    "ssd": Kernel("StateSpaceKernel", state=(0,), xs=(0, 0, 0, 0), params=(0, 0)),
}


def kernel_of(
    found: Recurrence,
    state: Sequence[Placement],
    xs: Sequence[Placement],
    params: Sequence[Placement],
) -> str | None:
    """The kernel's name, or None where a rank's operands are no smaller problem of its kind.

    Args:
        state: placements, without the batch's dims.
        xs, params: as the node has them; of x the dims before a token's are left out.
    """
    if found.kernel is None or found.seq_dims:
        return None
    kernel = KERNELS[found.kernel]
    lead = found.lead(found.step)
    inputs = found.step.inputs
    assert len(inputs) == len(state) + len(xs) + len(params), "a pass has changed a step's inputs"
    dims = (
        *kernel.state,
        *(d + lead for d in kernel.xs),
        *kernel.params[: len(params)],
    )
    leads = [lead] * len(state) + [0] * (len(xs) + len(params))
    sizes = [
        block_input.meta["type"].shape[d + more]
        for block_input, d, more in zip(inputs, dims, leads, strict=True)
    ]
    placed = [*state, *xs, *params]
    if all(at == REPLICATE for at in placed):
        return found.kernel
    return found.kernel if all(_fit(placed, dims, sizes)) else None


def _fit(placed: list[Placement], dims: tuple[int, ...], sizes: list[object]) -> Iterator[bool]:
    for at, dim, size in zip(placed, dims, sizes, strict=True):
        yield at.dim == dim if isinstance(at, Shard) else at == REPLICATE and size == 1
