"""A class that vLLM can load and that is made, when it is built, by a factory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_dp_group, get_ep_group, get_pp_group, get_tp_group
from vllm.model_executor.model_loader.utils import configure_quant_config
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.registry import ModelRegistry

from compiler.parallel import ParallelContext
from compiler.register import RegisterError
from compiler.vllm_target import compile_to_vllm
from funcmodels.spec import Model


class FactoryModel(nn.Module, SupportsLoRA, SupportsPP):
    """What vLLM inspects before there is a model; building it gives the emitted class's object."""

    factory: ClassVar[Callable[[Any, ParallelContext], Model]]
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {}  # pyright: ignore

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        _check_latest(cls, vllm_config.model_config.architecture)
        model = cls.factory(vllm_config.model_config.hf_config, parallel_context(vllm_config))
        served: Any = compile_to_vllm(model)
        if vllm_config.quant_config is not None:
            # vLLM told the quantisation about this class's fused modules, which has none: without
            # the emitted class's, ignored layers would be quantised, and nothing would say so.
            configure_quant_config(vllm_config.quant_config, served)
        return served(vllm_config=vllm_config, prefix=prefix)

    # Never called: vLLM decides by these how to build the class, and that it generates text.

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        raise NotImplementedError

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        raise NotImplementedError

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        raise NotImplementedError

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        raise NotImplementedError


def _check_latest(cls: type[FactoryModel], name: str) -> None:
    """Refuse a factory that another was registered after: vLLM remembers the class of a name.

    Raises:
        RegisterError: vLLM kept the first.
    """
    registered = ModelRegistry.models.get(name)
    latest: Any = registered.load_model_cls() if registered else cls
    if getattr(latest, "factory", cls.factory) is not cls.factory:
        raise RegisterError(
            f"{name} was registered again after this process had loaded it",
            got=f"{latest.factory.__qualname__} after {cls.factory.__qualname__}",
            need="a name of its own for each: vLLM kept the first",
            fix='fm.register(factory, name="NewName"), with hf_overrides={"architectures": '
            '["NewName"]}, or a new process',
        )


def parallel_context(vllm_config: VllmConfig) -> ParallelContext:
    """The live engine's ranks and groups, as this process sees them."""
    tp, pp, dp = get_tp_group(), get_pp_group(), get_dp_group()
    expert = vllm_config.parallel_config.enable_expert_parallel
    ep = get_ep_group() if expert else None
    return ParallelContext(
        tp_size=tp.world_size,
        tp_rank=tp.rank_in_group,
        tp_group=tp.device_group,
        pp_size=pp.world_size,
        pp_rank=pp.rank_in_group,
        pp_group=pp.device_group,
        dp_size=dp.world_size,
        dp_rank=dp.rank_in_group,
        dp_group=dp.device_group if dp.world_size > 1 else None,
        ep_size=ep.world_size if ep else 1,
        ep_rank=ep.rank_in_group if ep else 0,
        ep_group=ep.device_group if ep else None,
    )
