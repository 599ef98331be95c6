"""A mixture of experts as source text: vLLM's layer, with the model's own routing."""

from __future__ import annotations

from typing import Any

from torch import fx

from compiler import layers
from compiler.emit.layers import Layer, builds, prefix_of
from compiler.emit.scope import Scope
from compiler.emit.text import kwargs, literal
from compiler.experts_place import LEAVES
from compiler.ir import tensor_type


@builds(layers.experts)
def _experts(scope: Scope, node: fx.Node, attr: str) -> Layer:
    x, weights, ids, matrices, biases = node.args
    kind, activation = node.kwargs["kind"], node.kwargs["activation"]
    gate: Any = scope.block.params[str(matrices[0].target)]  # type: ignore[union-attr,index]
    count, mlp, hidden = (
        scope.module.size(a, n) for a, n in zip(gate.axes, gate.shape, strict=True)
    )
    (_, k) = tensor_type(ids).shape  # type: ignore[arg-type]
    gate_name, up_name, down_name = scope.placed.leaves.get(attr, LEAVES[0])
    names = (gate_name, down_name, up_name)
    is_default = names == ("gate_proj", "down_proj", "up_proj")
    if gate.dtype is not None:
        scope.module.use("torch")
    settings: dict[str, str | None] = {
        "num_experts": count,
        "top_k": str(k),
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "params_dtype": None if gate.dtype is None else str(gate.dtype),
        "activation": None if activation == "silu" else literal(activation),
        "has_bias": "True" if biases else None,
        "reduce_results": "False" if kind == "row_partial" else None,
        "tp_size": "1" if kind == "replicated" else None,
        "custom_routing_function": scope.module.help("unpacked_routing"),
        "router_logits_dtype": f"{scope.module.use('torch')}.float32",
        "routed_experts_cls": scope.module.help("OwnRoutedExperts"),
        "ckpt_names": None if is_default else literal(names),
        "quant_config": "vllm_config.quant_config",
        "prefix": prefix_of(attr),
    }
    routing = f"{scope.module.help('packed_routing')}({scope.value(weights)}, {scope.value(ids)})"
    divides = mlp if activation == "swigluoai" else 0
    check = f"{scope.module.help('check_experts')}(vllm_config, {hidden}, {divides}, "
    return Layer(
        scope.module.use("FusedMoEFactory"),
        kwargs(settings),
        f"{{}}({scope.value(x)}, {routing})",
        checks=[f"{check}is_summed={kind != 'row_partial'})"],
    )
