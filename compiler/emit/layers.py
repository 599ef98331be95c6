"""vLLM's layers as source text: how each is constructed, and how it is called."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from compiler import layers
from compiler.emit.pooling import check_encoder
from compiler.emit.scope import Scope
from compiler.emit.text import kwargs, literal
from compiler.ir import MODEL_DTYPE, LocalSize, tensor_type
from compiler.placement import Shard
from compiler.rules import LocalValues
from compiler.served_rope import served_rope
from funcmodels import ops
from funcmodels.errors import LoweringError
from funcmodels.spec import Param


@dataclass
class Layer:
    """One layer.

    Args:
        constructor, arguments: what makes it.
        call: the call's text, with `{}` for the layer.
        targets: how the call's result is taken apart, with `{}` for the value; "" for as it is.
        checks: further lines for the constructor of the class.
    """

    constructor: str
    arguments: list[str]
    call: str
    targets: str = ""
    checks: list[str] = field(default_factory=list)


Builder = Callable[[Scope, fx.Node, str], Layer]
BUILDERS: dict[Any, Builder] = {}


def builds(*targets: Any) -> Callable[[Builder], Builder]:
    def register(fn: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(targets, fn))
        return fn

    return register


def prefix_of(attr: str) -> str:
    """The prefix argument of a layer: its full name in the module tree, below the block's."""
    return f'f"{{prefix}}.{attr}"'


_LINEARS = {
    "replicated": "ReplicatedLinear",
    "column": "ColumnParallelLinear",
    "merged_column": "MergedColumnParallelLinear",
    "qkv": "QKVParallelLinear",
    "row": "RowParallelLinear",
    "row_partial": "RowParallelLinear",
}


@builds(layers.linear)
def _linear(scope: Scope, node: fx.Node, attr: str) -> Layer:
    x, weights, biases = node.args
    kind: Any = node.kwargs["kind"]
    matrices: Any = node.kwargs["matrices"]
    name = scope.module.use(_LINEARS[kind])
    params = [scope.block.params[str(w.target)] for w in weights]  # type: ignore[union-attr]
    seen = list(zip(params, matrices, strict=True))
    outs = [_features(scope, p, m.out_dims) for p, m in seen]
    ins = _features(scope, params[0], matrices[0].in_dims)
    settings: dict[str, str | None]
    if kind == "qkv":
        heads, kv_heads = (_units(scope, p, m) for p, m in seen[:2])
        widths = [_features(scope, p, m.out_dims[1:]) for p, m in seen]
        settings = {
            "hidden_size": ins,
            "head_size": widths[0],
            "total_num_heads": heads,
            "total_num_kv_heads": kv_heads,
            "v_head_size": widths[2] if widths[2] != widths[0] else None,
        }
    elif kind == "merged_column":
        settings = {"input_size": ins, "output_sizes": f"[{', '.join(outs)}]"}
    else:
        settings = {"input_size": ins, "output_size": outs[0]}
    settings |= {
        "params_dtype": None if params[0].dtype is None else str(params[0].dtype),
        "bias": str(bool(biases)),
        "reduce_results": "False" if kind == "row_partial" else None,
        "quant_config": "vllm_config.quant_config",
        "prefix": prefix_of(attr),
    }
    return Layer(name, kwargs(settings), f"{{}}({scope.value(x)})", "{}, _")


def _features(scope: Scope, param: Any, dims: tuple[int, ...]) -> str:
    """The product of some dims of a parameter, by their axes' names."""
    return " * ".join(scope.module.size(param.axes[d], param.shape[d]) for d in dims) or "1"


def _units(scope: Scope, param: Any, matrix: Any) -> str:
    """How many heads a projection has."""
    d = matrix.out_dims[0]
    return scope.module.size(param.axes[d], param.shape[d])


@builds(layers.add_rms_norm, ops.rms_norm)
def _rms_norm(scope: Scope, node: fx.Node, attr: str) -> Layer:
    fused = node.target is layers.add_rms_norm
    weight = node.args[2 if fused else 1]
    param = scope.block.params[str(weight.target)]  # type: ignore[union-attr]
    offset = node.kwargs.get("offset", 0.0)
    typed = _dtypes_differ(param, node)
    if offset not in (0.0, 1.0) and not typed:
        raise LoweringError(
            f"rms_norm with offset {offset} is no layer of vLLM's",
            need="offset 0.0, or 1.0 as Gemma has it",
            from_=node.meta["where"],
            fix="fold the offset into the weight",
        )
    args = [scope.module.size(param.axes[-1], param.shape[-1]), f"eps={node.kwargs['eps']}"]
    if typed:
        name = scope.module.help("TypedRMSNorm")
        args += [*_dtype(scope, param, "dtype"), *([f"offset={offset}"] if offset else [])]
        args += ["rounds_once=True"] if node.kwargs.get("rounds_once") else []
    else:
        name = scope.module.help("FastGemmaRMSNorm" if offset else "FastRMSNorm")
    if not fused:
        return Layer(name, args, f"{{}}({scope.value(node.args[0])})")
    x, residual = node.args[:2]
    call = f"{{}}({scope.value(x)}, {scope.value(residual)})"
    if isinstance(residual, fx.Node) and "optional" in residual.meta:
        return Layer(name, args, call, f"first {scope.value(x)} {scope.value(residual)}")
    return Layer(name, args, call)


def _dtypes_differ(param: Param, norm: fx.Node) -> bool:
    """Whether a norm's weight has another dtype than what it scales: vLLM's layers take one."""
    x: Any = norm.args[0]
    return param.dtype is not None or tensor_type(x).dtype != MODEL_DTYPE


def _dtype(scope: Scope, param: Param, argument: str) -> list[str]:
    """The argument for a declared dtype; a layer that is not told one has the model's."""
    if param.dtype is None:
        return []
    scope.module.use("torch")
    return [f"{argument}={param.dtype}"]


@builds(ops.layer_norm)
def _layer_norm(scope: Scope, node: fx.Node, attr: str) -> Layer:
    param = scope.block.params[str(node.args[1].target)]  # type: ignore[union-attr]
    scope.module.use("nn")
    bias = len(node.all_input_nodes) > 2
    size = scope.module.size(param.axes[-1], param.shape[-1])
    args = [size, f"eps={node.kwargs['eps']}", *([] if bias else ["bias=False"])]
    name = "nn.LayerNorm"
    if _dtypes_differ(param, node):
        name = scope.module.help("TypedLayerNorm")
        args += _dtype(scope, param, "dtype")
    return Layer(name, args, f"{{}}({scope.value(node.args[0])})")


@builds(layers.silu_and_mul)
def _silu_and_mul(scope: Scope, node: fx.Node, attr: str) -> Layer:
    return Layer(scope.module.help("FastSiluAndMul"), [], f"{{}}({scope.value(node.args[0])})")


@builds(layers.gelu_and_mul)
def _gelu_and_mul(scope: Scope, node: fx.Node, attr: str) -> Layer:
    args = [f"approximate={literal(node.kwargs['approximate'])}"]
    return Layer(scope.module.help("FastGeluAndMul"), args, f"{{}}({scope.value(node.args[0])})")


@builds(layers.vocab_embedding)
def _vocab_embedding(scope: Scope, node: fx.Node, attr: str) -> Layer:
    args = _vocab_arguments(scope, node.args[1], attr)
    name = scope.module.use("VocabParallelEmbedding")
    return Layer(name, args, f"{{}}({scope.value(node.args[0])})")


@builds(layers.logits)
def _logits(scope: Scope, node: fx.Node, attr: str) -> Layer:
    name = scope.module.use("ParallelLMHead")
    args = _vocab_arguments(scope, node.args[1], attr)
    return Layer(name, args, f"self.logits_processor({{}}, {scope.value(node.args[0])})")


def _vocab_arguments(scope: Scope, table: Any, attr: str) -> list[str]:
    param = scope.block.params[str(table.target)]
    sizes = [scope.module.size(a, n) for a, n in zip(param.axes, param.shape, strict=True)]
    sizes += _dtype(scope, param, "params_dtype")
    return [*sizes, "quant_config=vllm_config.quant_config", f"prefix={prefix_of(attr)}"]


@builds(layers.attention)
def _attention(scope: Scope, node: fx.Node, attr: str) -> Layer:
    s = dict(node.kwargs)
    is_causal = s.get("causal", True)
    if not is_causal:
        check_encoder(scope, node)
    refuse_segments(node)
    q, k, v = node.args[:3]
    head_dim, v_head_dim = s["head_dim"], s["v_head_dim"]
    size = scope.module.size("head_dim", head_dim)  # type: ignore[arg-type]
    scale = s.get("scale")
    default = scale is None or math.isclose(scale, head_dim**-0.5, rel_tol=1e-12)  # type: ignore[arg-type,operator]
    slopes = s.get("alibi_slopes")
    sinks = s.get("sinks")
    checks = []
    if s.get("window") is None:
        checks = [f"{scope.module.help('check_full_attention')}(vllm_config)"]
    if scope.module.has_latent:
        checks.append(f"{scope.module.help('check_keys_cached')}(vllm_config)")
    checks += _check_dtype(scope, q)
    settings: dict[str, str | None] = {
        "num_heads": local_heads(scope, q, s["heads"]),
        "head_size": size,
        "scale": f"{size}**-0.5" if default else repr(scale),
        "num_kv_heads": local_heads(scope, k, s["kv_heads"]),
        "alibi_slopes": _slopes(scope, slopes),
        "cache_config": "vllm_config.cache_config",
        "quant_config": "vllm_config.quant_config",
        "logits_soft_cap": None if s.get("softcap") is None else repr(s["softcap"]),
        "per_layer_sliding_window": None if s.get("window") is None else repr(s["window"]),
        "sinks": scope.value(sinks) if sinks is not None else None,
        "head_size_v": str(v_head_dim) if v_head_dim != head_dim else None,
        "prefix": numbered_prefix(scope, attr),
    }
    call = f"{{}}({', '.join(scope.value(a) for a in (q, k, v))})"
    kind = scope.module.use("Attention" if is_causal else "EncoderOnlyAttention")
    return Layer(kind, kwargs(settings), call, checks=checks)


def refuse_segments(node: fx.Node) -> None:
    """Segments of forward's own are not traced for the engine: these are others."""
    if node.kwargs.get("segment_ids") is not None:
        raise LoweringError(
            "segment ids are computed inside forward",
            need="the segment_ids argument of forward, or none: requests are apart in the engine",
            from_=node.meta["where"],
            fix="pass forward's segment_ids on",
        )


def numbered_prefix(scope: Scope, attr: str) -> str:
    """The engine tells layers apart by the one number in their names: some need one made up."""
    names = [f"{anchor}.{attr}".split(".") for anchor in scope.placed.anchors]
    if all(sum(part.isdigit() for part in name) == 1 for name in names):
        return prefix_of(attr)
    return f"{scope.module.help('numbered')}({prefix_of(attr)}, vllm_config)"


def local_heads(scope: Scope, x: Any, count: Any) -> str:
    """How many heads a rank has."""
    at = x.meta["placement"]
    if not isinstance(at, Shard):
        return str(count)
    return scope.local_size(LocalSize(at.units, count // at.units, at.axis, "tp"))


def _slopes(scope: Scope, slopes: Any) -> str | None:
    """ALiBi slopes: those of the rank's own heads."""
    if slopes is None:
        return None
    if isinstance(slopes, LocalValues):
        return f"{scope.module.help('own_values')}({literal(list(slopes.values))})"
    if isinstance(slopes, (tuple, list)):
        return literal(list(slopes))
    raise LoweringError(
        "alibi_slopes must be numbers when a model is served",
        got="a tensor",
        need="a tuple of floats, one a head",
        fix="compute them in Python: tuple(2 ** (-8 * (i + 1) / heads) for i in range(heads))",
    )


def _check_dtype(scope: Scope, q: Any) -> list[str]:
    """The check that an engine runs in the dtype of attention's operands, where that is fixed."""
    dtype = tensor_type(q).dtype
    if dtype == MODEL_DTYPE:
        return []
    scope.module.use("torch")
    return [f"{scope.module.help('check_dtype')}(vllm_config, {dtype})"]


@builds(layers.rotary)
def _rotary(scope: Scope, node: fx.Node, attr: str) -> Layer:
    positions, q, k = node.args
    s = dict(node.kwargs)
    head_dim: Any = s["head_dim"]
    served = served_rope(s, head_dim)
    checks = []
    if served.check is not None:
        name, longest, kind = served.check
        checks = [f"{scope.module.help(name)}(vllm_config, {longest}, {literal(kind)})"]
    # The engine reads the angles from a table, and past its end whatever is there.
    limit, length = s.get("max_position"), "vllm_config.model_config.max_model_len"
    rows = served.table
    if rows:
        checks = [*checks, f"{scope.module.help('check_positions')}(vllm_config, {rows})"]
    elif limit:
        limit = f"max({limit}, {length})"
    checks += _check_dtype(scope, q)
    settings: dict[str, str | None] = {
        "head_size": scope.module.size("head_dim", head_dim),
        "max_position": str(limit or length),
        "is_neox_style": "False" if s.get("interleaved") else None,
        "rope_parameters": literal(served.parameters),
    }
    call = f"{{}}({', '.join(scope.value(a) for a in (positions, q, k))})"
    return Layer(scope.module.use("get_rope"), kwargs(settings), call, checks=checks)
