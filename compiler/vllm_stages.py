"""What pipeline stages send each other, and the room for it.

Copied into emitted files as it stands here; it may use the names that the file imports, and what
else is copied.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors


class Carried:
    """A value that pipeline stages send on: its name, and the stages that receive it.

    Args:
        to: the layers with which such a stage may begin.
        sizes: beside the number of tokens.
        dtype: None for the engine's own.
        cut: the dim that is cut over the ranks, and the number of its parts.
    """

    def __init__(
        self,
        name: str,
        to: range,
        *sizes: int,
        dtype: torch.dtype | None = None,
        cut: tuple[int, int] | None = None,
    ) -> None:
        self.name, self.to, self.dtype = name, to, dtype
        self.sizes, self.dim = list(sizes), None
        ranks = get_tensor_model_parallel_world_size()
        if cut is not None:  # ranks beyond the number of parts have some part again
            self.dim, parts = cut
            self.sizes[self.dim - 1] = sizes[self.dim - 1] // parts * max(parts, ranks)


class Stage:
    """The layers of a pipeline stage, and what it receives and sends.

    Between stages the engine sends a part of each tensor from each rank, and joins them: as if all
    ranks had the same. So what is cut over the ranks is joined before, and cut again.
    """

    def __init__(self, start_layer: int, end_layer: int, *values: Carried) -> None:
        self.layers = range(start_layer, end_layer)
        self.received_values = {v.name: v for v in values if start_layer in v.to}
        self.sent_values = {v.name: v for v in values if end_layer in v.to}

    def received(self, tensors: IntermediateTensors) -> dict[str, torch.Tensor]:
        """What this stage receives, by name."""
        found = {}
        for name, value in self.received_values.items():
            x = tensors.tensors[name]
            if value.dim is not None:
                width = x.shape[value.dim] // get_tensor_model_parallel_world_size()
                x = x.narrow(value.dim, get_tensor_model_parallel_rank() * width, width)
            found[name] = x
        return found

    def sent(self, **values: torch.Tensor | None) -> IntermediateTensors:
        """Of all values those that the next stage receives."""
        found = {}
        for name, value in self.sent_values.items():
            x = values[name]
            assert x is not None, f"{name} is sent before it is made"
            x = x.contiguous()
            found[name] = x if value.dim is None else tensor_model_parallel_all_gather(x, value.dim)
        return IntermediateTensors(found)

    def make_empty(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Room for what this stage receives."""
        return IntermediateTensors(
            {
                name: torch.zeros((batch_size, *v.sizes), dtype=v.dtype or dtype, device=device)
                for name, v in self.received_values.items()
            }
        )


def made_in_time(vllm_config: VllmConfig, make_empty: Callable) -> Callable:
    """The same; on a CPU, an eager engine is made to call it before the first request.

    What a later stage receives goes to tensors made when the engine warms up. Eagerly, on a CPU, it
    leaves that out: it is told that it compiles until it has warmed up.
    """
    config = vllm_config.compilation_config
    eager_on_cpu = config.mode == CompilationMode.NONE and current_platform.is_cpu()
    if get_pp_group().is_first_rank or not eager_on_cpu:
        return make_empty
    config.mode = CompilationMode.STOCK_TORCH_COMPILE

    def make(batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        config.mode = CompilationMode.NONE
        return make_empty(batch_size, dtype, device)

    return make


def empty_of(dtypes: dict, hidden_size: int) -> Callable:
    """What makes the tensors that a stage receives, by name; None is the engine's own dtype."""

    def make(batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        return IntermediateTensors(
            {
                name: torch.zeros((batch_size, hidden_size), dtype=own or dtype, device=device)
                for name, own in dtypes.items()
            }
        )

    return make
