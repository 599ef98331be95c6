"""`fm.state`: the recurrent state of a layer, declared as parameters are, by named axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from funcmodels.errors import DeclarationError, listed
from funcmodels.source import SourceLine, users_line


@dataclass(frozen=True)
class Slot:
    """One tensor of a state: names and sizes of its dims, its dtype, and what it begins with."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    init: float

    def initial(self, batch: tuple[int, ...], device: torch.device) -> Tensor:
        """(*batch, *shape), filled with `init`."""
        return torch.full((*batch, *self.shape), self.init, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class State:
    """What a recurrence carries from one token to the next."""

    slots: Mapping[str, Slot]
    where: SourceLine = field(compare=False)

    def initial(self, batch: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """The state before the first token of each sequence of a batch."""
        return {name: slot.initial(batch, device) for name, slot in self.slots.items()}

    @property
    def numel(self) -> int:
        """Elements of one sequence's state."""
        return sum(torch.Size(slot.shape).numel() for slot in self.slots.values())


def state(
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    init: float | Mapping[str, float] = 0.0,
    **tensors_and_sizes: str | int,
) -> State:
    """Declare a recurrent state: its tensors by their axes, and the sizes of those.

        fm.state(S="heads key value", dtype=torch.float32, heads=8, key=64, value=64)

    Args:
        dtype: of all tensors, or of each by name. It is kept while serving too.
        init: what a sequence's state begins with, of all tensors or of each by name.
        tensors_and_sizes: a tensor's space-separated axes, as text; an axis's size, as a number.
    Returns:
        The declaration; `ops.recurrent` takes it. Its axes are cut over ranks by the model's table.
    Raises:
        DeclarationError: an axis without a size or one that no tensor has, or no tensor.
    """
    where = users_line()
    tensors = {name: v for name, v in tensors_and_sizes.items() if isinstance(v, str)}
    sizes = {name: v for name, v in tensors_and_sizes.items() if not isinstance(v, str)}
    used = {axis: name for name, axes in tensors.items() for axis in axes.split()}
    if not tensors:
        raise DeclarationError(
            "a state without tensors",
            got=listed(sizes),
            need="a tensor's axes as text",
            from_=where,
            fix='fm.state(S="heads key value", dtype=torch.float32, heads=..., key=..., value=...)',
        )
    for axis in [*used, *sizes]:
        size = sizes.get(axis)
        if axis not in used or not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise DeclarationError(
                f'axis "{axis}" of a state has no tensor'
                if axis not in used
                else f'axis "{axis}" of the state "{used[axis]}" has no valid size',
                got=", ".join(f"{name}={value!r}" for name, value in tensors_and_sizes.items()),
                need="a size of at least 1 for each axis, and a tensor that has it",
                from_=where,
                fix=f"fm.state(..., {axis}=...)" if axis in used else f"leave {axis} out",
            )
    for what, given in (("dtype", dtype), ("init", init)):
        if isinstance(given, Mapping) and set(given) != set(tensors):
            raise DeclarationError(
                f"{what} by name of other tensors than the state's",
                got=listed(given),
                need=listed(tensors),
                from_=where,
                fix=f"one {what} for all, or one for each",
            )
    slots = {
        name: Slot(
            tuple(axes.split()),
            tuple(sizes[axis] for axis in axes.split()),  # type: ignore[misc]
            dtype[name] if isinstance(dtype, Mapping) else dtype,
            float(init[name] if isinstance(init, Mapping) else init),
        )
        for name, axes in tensors.items()
    }
    return State(slots, where)
