"""`fm.nn.to_vllm`: layers of `funcmodels.nn` as vLLM's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers import layernorm, linear, vocab_parallel_embedding
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

import funcmodels.nn as fnn
from compiler import vllm_checks
from compiler.served_rope import served_rope
from funcmodels.errors import LoweringError

Builder = Callable[..., nn.Module]


def converted(module: nn.Module, prefix: str, quant_config: Any) -> nn.Module:
    """A copy of a module, of which the layers are vLLM's; the rest is the module's own."""
    if quant_config is not None:
        _refuse_values(module, prefix)
    done: dict[int, nn.Module] = {}
    found = _converted(module, prefix, quant_config, done)
    _tie(module, done)
    return found


def _converted(
    module: nn.Module, prefix: str, quant_config: Any, done: dict[int, nn.Module]
) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    if isinstance(module, fnn.ParallelLayer):
        made = _layer(module, prefix, quant_config)
        _load(module, made)
        done[id(module)] = made
        return made
    copy = module.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy._parameters = {n: p if p is None else _with_memory(p) for n, p in copy._parameters.items()}
    _refuse_meta_buffers(module, prefix)
    copy._modules = modules = {}
    done[id(module)] = copy
    for name, child in module._modules.items():
        path = f"{prefix}.{name}" if prefix else name
        modules[name] = None if child is None else _converted(child, path, quant_config, done)
    return copy


def _with_memory(param: nn.Parameter) -> nn.Parameter:
    """A parameter of a user's own; one on the meta device becomes one that vLLM can load into."""
    if not param.is_meta:
        return param
    return nn.Parameter(torch.empty(param.shape, dtype=param.dtype), requires_grad=False)


def _refuse_meta_buffers(module: nn.Module, prefix: str) -> None:
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_meta:
            raise LoweringError(
                f"the values of a buffer are not known: {prefix}.{name}",
                got="a buffer on the meta device, which no checkpoint fills",
                need="its values",
                fix=f'compute {name} under `with torch.device("cpu"):`, or in forward',
            )


def _layer(layer: fnn.ParallelLayer, prefix: str, quant_config: Any) -> nn.Module:
    if type(layer) not in _BUILDERS:
        raise LoweringError(
            f"vLLM has no layer for {type(layer).__name__}",
            need=", ".join(sorted(kind.__name__ for kind in _BUILDERS)),
            from_=prefix or None,
            fix="wrap a layer in a module of yours, rather than derive from it",
        )
    return _BUILDERS[type(layer)](layer, quant_config=quant_config, prefix=prefix)


def _column(layer: fnn.ColumnParallelLinear, **where: Any) -> nn.Module:
    return linear.ColumnParallelLinear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        gather_output=layer.gather_output,
        return_bias=False,
        **where,
    )


def _row(layer: fnn.RowParallelLinear, **where: Any) -> nn.Module:
    return linear.RowParallelLinear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        input_is_parallel=layer.input_is_parallel,
        return_bias=False,
        **where,
    )


def _embedding(layer: fnn.VocabParallelEmbedding, **where: Any) -> nn.Module:
    return vocab_parallel_embedding.VocabParallelEmbedding(
        layer.num_embeddings, layer.embedding_dim, **where
    )


def _head(layer: fnn.ParallelLMHead, **where: Any) -> nn.Module:
    return vocab_parallel_embedding.ParallelLMHead(
        layer.num_embeddings, layer.embedding_dim, **where
    )


def _rms_norm(layer: fnn.RMSNorm, *, prefix: str, **_: Any) -> nn.Module:
    if layer.offset not in (0.0, 1.0):
        raise LoweringError(
            f"vLLM has no RMSNorm with offset {layer.offset}",
            need="offset 0.0, or 1.0 as Gemma has it",
            from_=prefix or None,
            fix="fold the offset into the weight",
        )
    kind = layernorm.GemmaRMSNorm if layer.offset else layernorm.RMSNorm
    return kind(layer.hidden_size, eps=layer.eps)


def _layer_norm(layer: fnn.LayerNorm, **_: Any) -> nn.Module:
    return layernorm.LayerNorm(layer.hidden_size, eps=layer.eps, bias=layer.bias is not None)


class ServedRotary(nn.Module):
    """vLLM's rope, called with heads of their own dim, as `fm.nn.RotaryEmbedding` is."""

    def __init__(self, layer: fnn.RotaryEmbedding, **_: Any) -> None:
        super().__init__()
        self.head_dim = layer.head_dim
        settings = layer.settings
        served = served_rope(settings, layer.head_dim)
        limit = served.table or settings["max_position"]
        vllm_config = get_current_vllm_config()
        if vllm_config.model_config is not None:
            if served.check is not None:
                name, longest, kind = served.check
                getattr(vllm_checks, name)(vllm_config, longest, kind)
            if served.table is not None:
                vllm_checks.check_positions(vllm_config, served.table)
            else:  # past its end the table is read all the same
                limit = max(limit or 0, vllm_config.model_config.max_model_len)
        if limit is None or (vllm_config.model_config is None and served.check is not None):
            raise LoweringError(
                "how far the angles of this rope must reach is not known",
                got="no max_position, outside an engine"
                if served.check is None
                else f"rope type {served.check[2]!r}, outside an engine",
                need="vLLM's config of a model, or, for ropes that do not depend on the length, "
                "max_position",
                fix="call to_vllm in the __init__ of a class that vLLM makes, or give max_position",
            )
        table = settings["max_position"] if served.table is not None else limit
        self.rope = get_rope(
            layer.head_dim,
            max_position=table or limit,
            is_neox_style=not settings["interleaved"],
            rope_parameters=served.parameters,
        )

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        # Copies, since the kernel writes to what it is given; flat, as its CPU form must be.
        flat = [x.reshape(-1, x.shape[-2] * self.head_dim).clone() for x in (q, k)]
        turned = self.rope(positions.reshape(-1), *flat)
        new_q, new_k = (y.view(x.shape) for x, y in zip((q, k), turned, strict=True))
        return new_q, new_k


_BUILDERS: dict[type[fnn.ParallelLayer], Builder] = {
    fnn.ColumnParallelLinear: _column,
    fnn.RowParallelLinear: _row,
    fnn.VocabParallelEmbedding: _embedding,
    fnn.ParallelLMHead: _head,
    fnn.RMSNorm: _rms_norm,
    fnn.LayerNorm: _layer_norm,
    fnn.RotaryEmbedding: ServedRotary,
}


def _load(layer: fnn.ParallelLayer, made: nn.Module) -> None:
    """Weights, of which vLLM's loaders take this rank's part; none from the meta device."""
    held = dict(layer.named_parameters(recurse=False))
    if not held or any(value.is_meta for value in held.values()):
        return
    with torch.no_grad():
        for name, value in fnn.whole(layer).items():
            param = made.get_parameter(name)
            getattr(param, "weight_loader", default_weight_loader)(param, value)


def _tie(module: nn.Module, done: dict[int, nn.Module]) -> None:
    """Heads whose table is that of an embedding, tied as vLLM ties them."""
    layers = [m for m in module.modules() if id(m) in done]
    tables = {id(m.weight): m for m in layers if isinstance(m, fnn.VocabParallelEmbedding)}
    for head in layers:
        if isinstance(head, fnn.ParallelLMHead) and id(head.weight) in tables:
            tied = done[id(head)].tie_weights(done[id(tables[id(head.weight)])])  # type: ignore[operator]
            if tied is not done[id(head)]:
                raise LoweringError(
                    "this quantisation of vLLM's ties a head by replacing it",
                    fix="do not tie head and embedding",
                )


def _refuse_values(module: nn.Module, prefix: str) -> None:
    """How weights that are there become quantised is not ours to say."""
    for path, layer in module.named_modules():
        if isinstance(layer, fnn.ParallelLayer):
            for name, value in layer.named_parameters(recurse=False):
                if not value.is_meta:
                    raise LoweringError(
                        "quant_config is for weights that vLLM loads itself",
                        got=f"{path}.{name} on {value.device}".lstrip("."),
                        need="a module without weights",
                        from_=prefix or None,
                        fix='build it under `with torch.device("meta"):`',
                    )
