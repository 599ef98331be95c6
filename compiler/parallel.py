"""What a factory is told of the engine that it makes a model for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ParallelContext:
    """Ranks, sizes and process groups of a live engine, in the process that builds the model.

    Version 1. Fields are only ever added; `version` grows when they are. A factory is called as
    `factory(hf_config, parallel)`, with the engine's `PretrainedConfig` and this, once in every
    worker process, before any parameter is allocated; it returns a `Model`, and may choose the
    sharding by what it is told. Every rank must return the same parameters.

    Args:
        tp_size, tp_rank, tp_group: tensor parallelism.
        pp_size, pp_rank, pp_group: pipeline parallelism.
        dp_size, dp_rank, dp_group: data parallelism; the group is None where there is none.
        ep_size, ep_rank, ep_group: expert parallelism; 1, 0 and None unless it is switched on.
    """

    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    dp_size: int = 1
    dp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    tp_group: ProcessGroup | None = field(default=None, compare=False)
    pp_group: ProcessGroup | None = field(default=None, compare=False)
    dp_group: ProcessGroup | None = field(default=None, compare=False)
    ep_group: ProcessGroup | None = field(default=None, compare=False)
    version: int = 1
