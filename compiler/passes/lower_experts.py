"""A mixture of experts -> the engine's layer, which holds every expert's matrices."""

from __future__ import annotations

from typing import Any

from torch import fx

from compiler import collectives, layers
from compiler.ir import Block, tensor_type
from compiler.passes.parameter_view import uses_of
from compiler.placement import REPLICATE
from compiler.rewrite import calls_of, insert, is_call, is_param, only_user, replace_with
from compiler.rules.mixture import experts_of_rank
from funcmodels import ops
from funcmodels.errors import LoweringError

_OPERANDS = ("x", "weights", "ids", "gate", "up", "down")
_BIASES = ("gate_bias", "up_bias", "down_bias")
# vLLM's kernels know these constants, and take no others.
SWIGLUOAI = {"alpha": 1.702, "limit": 7.0}


def lower_experts(block: Block) -> Block:
    """Gather the matrices into one layer, with the sum over ranks where nothing comes between.

        y = experts_of_rank(x, weights, ids, p.gate, p.up, p.down); z = all_reduce(y)
    ->
        z = experts(x, weights, ids, (p.gate, p.up, p.down), (), kind="row")

    What makes weights and ids stays as it is: the layer is given both.
    """
    for node in calls_of(block, ops.experts, experts_of_rank):
        _lower(block, node)
    return block


def _lower(block: Block, node: fx.Node) -> None:
    given: dict[str, Any] = {**node.kwargs, **dict(zip(_OPERANDS, node.args, strict=False))}
    matrices = tuple(given[name] for name in _OPERANDS[3:])
    biases = tuple(given.get(name) for name in _BIASES)
    biases = biases if any(b is not None for b in biases) else ()
    settings = {name: given[name] for name in ("activation", "alpha", "limit") if name in given}
    settings = {name: value for name, value in settings.items() if value is not None}
    _check(block, node, [p for p in (*matrices, *biases) if p is not None], settings)
    kind = "replicated"
    if node.target is experts_of_rank:
        kind, reduced = "row_partial", only_user(node)
        if is_call(reduced, collectives.all_reduce):
            assert reduced is not None
            reduced.replace_input_with(node, reduced.args[0])  # type: ignore[arg-type]
            kind, node = "row", reduced
    args = (*(given[name] for name in _OPERANDS[:3]), matrices, biases)
    at = node.meta["placement"] if kind == "row_partial" else REPLICATE
    name = node.name if kind != "row" else "out"
    settings = {"kind": kind, **settings}
    new = insert(block, node, layers.experts, args, settings, placement=at, name=name)
    replace_with(block, node, new)


def _check(block: Block, node: fx.Node, params: list[fx.Node], settings: dict[str, Any]) -> None:
    where = node.meta["where"]
    strange = [p for p in params if not is_param(p) or uses_of(block, p) != {node}]
    if strange:
        raise LoweringError(
            "experts of which a matrix is no parameter of its own",
            got=f"{strange[0].name}, "
            + ("used elsewhere too" if is_param(strange[0]) else "a value that is computed"),
            need="gate, up and down as they are declared, read here alone: the layer owns them",
            from_=where,
            fix='P("experts mlp hidden"), and for checkpoints that keep them otherwise '
            'hf="name: experts hidden mlp[0:1/2]"',
        )
    if len(tensor_type(node).shape) != 2:
        raise LoweringError(
            "experts of several rows of each token",
            got=f"a result {tensor_type(node)}",
            need="x (num_tokens, hidden)",
            from_=where,
            fix="route each token once",
        )
    if node.kwargs.get("own"):
        raise LoweringError(
            "the experts are divided over the ranks that share each layer",
            got='the axis of experts on "tp"',
            need="each rank with a part of every expert, or expert parallelism",
            from_=where,
            fix='sharding={"mlp": "tp", "experts": "ep"}, with the names of your axes',
        )
    constants = {name: value for name, value in settings.items() if name != "activation"}
    if constants and constants != SWIGLUOAI:
        raise LoweringError(
            f'constants of the activation "{settings["activation"]}" that vLLM does not have',
            got=", ".join(f"{name}={value}" for name, value in constants.items()),
            need=", ".join(f"{name}={value}" for name, value in SWIGLUOAI.items()),
            from_=where,
            fix="these constants, which are GPT-OSS's",
        )
