"""`fm.explain`: what became of every parameter and operation, and what it costs."""

from __future__ import annotations

import torch

from compiler.check import Layouts
from compiler.emit import emit_model
from compiler.explain.inventory import Inventory, Setting
from compiler.explain.padding import head_padding
from compiler.explain.report import Explanation
from compiler.explain.roofline import DEVICES, Device, estimate
from compiler.pad import PaddedModel
from compiler.vllm_target import lower_to_vllm, uncollected
from funcmodels.errors import FuncModelsError
from funcmodels.spec import Model


class ExplainError(FuncModelsError):
    """`fm.explain` was asked for something that it has no figures for."""


def explain(
    model: Model,
    *,
    tp: int = 1,
    ep: int = 1,
    pp: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    device: Device | str | None = None,
    prompt: int = 2048,
    batch: int = 1,
    context: int | None = None,
) -> Explanation:
    """What a model becomes when it is served: without a GPU, weights, processes or vLLM.

    For every parameter its layer of vLLM's, what each rank holds of it, and whether it can be
    quantised and adapted; for every operation left to plain torch its line and why; for every
    collective its line and its bytes; and the totals of each rank.

    Args:
        model: the model.
        tp, ep, pp: ranks that share each layer, that share the experts, and pipeline stages. vLLM
            divides experts over the ranks of tp and of data parallelism: ep is a multiple of tp.
        dtype: of the parameters that declare none of their own.
        kv_dtype: of the KV cache; that of the weights by default.
        device: a `fm.Device`, or a name of `fm.DEVICES`, for an estimate of times.
        prompt: tokens of the prompt whose prefill is estimated.
        batch, context: sequences, and tokens that each has, of the decoding step that is estimated;
            the context is as long as the prompt by default.
    Returns:
        An `Explanation`: print it, or `.to_json()`, `.to_html(path)`.
    Raises:
        ShardingError: the model cannot be served on so many ranks.
        TraceError, LoweringError: as `compile_to_vllm`.
        ExplainError: an unknown device, or figures that are not for the dtype.
    """
    found = _device(device, dtype)
    with uncollected():
        program = lower_to_vllm(model)
        Layouts(model, program).check(tp=tp, pp=pp, ep=ep)
        emit_model(program)  # what cannot be written is refused here too
        inventory = Inventory(program, Setting(tp, pp, dtype, kv_dtype or dtype, ep))
        blocks = inventory.blocks()
        stages = inventory.stages(blocks)
    times = None
    if found is not None:
        times = estimate(
            found, blocks, stages, prompt=prompt, batch=batch, context=context or prompt
        )
    return Explanation(
        model.name,
        model.num_parameters,
        tp,
        ep,
        pp,
        _name(dtype),
        _name(kv_dtype or dtype),
        blocks,
        stages,
        inventory.unread(blocks),
        times,
        head_padding(model.zeros if isinstance(model, PaddedModel) else {}, blocks, stages, tp),
    )


def _device(device: Device | str | None, dtype: torch.dtype) -> Device | None:
    if not isinstance(device, str):
        return device
    found = DEVICES.get(device.lower())
    if found is None:
        raise ExplainError(
            f'no figures of a device "{device}"',
            need=f"one of {', '.join(DEVICES)}, or a fm.Device",
            fix=f'fm.Device("{device}", flops=..., bandwidth=..., link=..., memory=...)',
        )
    if dtype.itemsize != 2:
        raise ExplainError(
            f'the figures of "{device}" are of 16-bit weights',
            got=_name(dtype),
            need="float16 or bfloat16, or figures of another dtype",
            fix=f'fm.Device("{device}", flops=..., bandwidth=..., link=..., memory=...)',
        )
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
