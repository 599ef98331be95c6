"""Whole tensors into a module of parallel layers, and out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from funcmodels.errors import CheckpointError, ShapeError, TrainingError, listed
from funcmodels.nn.layer import ParallelLayer

M = TypeVar("M", bound=nn.Module)


def load_whole(module: M, tensors: Mapping[str, Tensor]) -> M:
    """Fill a module from whole tensors, of which this rank's layers keep their parts.

    Args:
        module: a layer, or any module that has layers somewhere in it.
        tensors: by the names of `module.state_dict()`. A parameter with several names, as a tied
            one, may stand under one of them. Cast to the dtypes of the module.
    Returns:
        The module.
    Raises:
        CheckpointError: tensors that are missing, or that the module does not have.
        ShapeError: a tensor that is not the whole of its parameter.
        TrainingError: a parameter is on the meta device.
    """
    own = module.state_dict(keep_vars=True)
    given = {id(own[name]) for name in tensors if name in own}
    missing = [name for name, value in own.items() if id(value) not in given]
    unknown = [name for name in tensors if name not in own]
    if missing or unknown:
        raise CheckpointError(
            f"the tensors are not those of {type(module).__name__}",
            missing=listed(missing),
            unknown=listed(unknown),
            need=f"the names of its state_dict, {listed(own)}",
        )
    layers = _layers(module)
    for name, whole in tensors.items():
        shape = _whole_shape(layers, name, own[name])
        if tuple(whole.shape) != shape:
            raise ShapeError(
                f"the tensor for {name} is not the whole of it",
                got=str(tuple(whole.shape)),
                need=str(shape),
                fix="module.load_state_dict(tensors), which takes a rank's parts"
                if whole.shape == own[name].shape
                else None,
            )
    _refuse_meta(own)
    with torch.no_grad():
        for name, whole in tensors.items():
            if name in layers:
                layer, parameter = layers[name]
                whole = layer.part(parameter, whole)
            own[name].copy_(whole)
    return module


def whole(module: nn.Module, local: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Whole tensors on every rank, from each one's part; all ranks must call it.

    Args:
        module: a layer, or any module that has layers somewhere in it.
        local: by the names of `module.state_dict()`, of its shapes, for instance gradients; by
            default what the module holds.
    Returns:
        Copies, by the same names.
    """
    local = module.state_dict() if local is None else local
    layers = _layers(module)
    found = {}
    for name, part in local.items():
        part = part.detach()
        if name in layers:
            layer, parameter = layers[name]
            if layer.ranks is not None and parameter in layer.cuts:
                with torch.no_grad():
                    (part,) = layer.ranks.whole([part], layer.cuts[parameter], layer.size)
        found[name] = part.clone(memory_format=torch.contiguous_format)
    return found


Layers = dict[str, tuple[ParallelLayer, str]]


def _layers(module: nn.Module) -> Layers:
    """The layer and the name in it of each tensor that a layer holds, by its name in the module."""
    return {
        f"{path}.{name}" if path else name: (layer, name)
        for path, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, ParallelLayer)
        for name, _ in layer.named_parameters(recurse=False, remove_duplicate=False)
    }


def _whole_shape(layers: Layers, name: str, own: Tensor) -> tuple[int, ...]:
    if name not in layers:
        return tuple(own.shape)
    layer, parameter = layers[name]
    return layer.whole_shape(parameter)


def _refuse_meta(own: Mapping[str, Tensor]) -> None:
    empty = [name for name, value in own.items() if value.is_meta]
    if empty:
        raise TrainingError(
            "parameters on the meta device hold nothing",
            got=listed(empty),
            need="memory for what is loaded",
            fix='module.to_empty(device="cpu"), and then load_whole',
        )
