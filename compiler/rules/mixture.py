"""A mixture of experts: its tokens are cut, or the middle of each expert, or the experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from compiler.placement import PARTIAL, REPLICATE, Placement, Shard
from compiler.rules.local import LocalValues
from compiler.rules.rule import Decision, Exactly, View, rule
from funcmodels import ops
from funcmodels.ops.moe import mixture

# The dim of each parameter that is the expert, and the one that is the middle of its layer.
_DIMS = {
    "gate": (0, 1),
    "up": (0, 1),
    "down": (0, 2),
    "gate_bias": (0, 1),
    "up_bias": (0, 1),
    "down_bias": (0, None),
}


def experts_of_rank(
    *args: Tensor,
    down_bias: Tensor | None = None,
    own: tuple[float, ...] = (),
    share: tuple[float, ...] = (),
    **settings: Any,
) -> Tensor:
    """What one rank adds to `ops.experts`.

    Args:
        own: the ids of the experts that it has, where they are divided.
        share: begins with 1 on the first rank and with 0 on others, where the middle of experts is
            divided: the bias after it is added once.
    """
    if down_bias is not None and share:
        down_bias = down_bias * share[0]
    return mixture(*args, down_bias=down_bias, first=int(own[0]) if own else None, **settings)


@rule(ops.experts)
def experts(view: View) -> Decision | None:
    """Each rank adds its part of the sum, or has its own tokens."""
    x, weights, ids = (view.arg(i, n) for i, n in enumerate(("x", "weights", "ids")))
    params = {n: view.arg(i + 3, n) for i, n in enumerate(("gate", "up", "down"))}
    params |= {n: view.node.kwargs.get(n) for n in _DIMS if n.endswith("bias")}
    params = {name: p for name, p in params.items() if isinstance(p, fx.Node)}
    whole: dict[fx.Node, Placement] = dict.fromkeys(view.tensors, REPLICATE)
    cut = _cut(view, params)
    if cut is None:
        return _by_tokens(view, (x, weights, ids), whole)
    at, which = cut
    for name, param in params.items():
        dim = _DIMS[name][which]
        if dim is not None:
            whole[param] = Shard(dim, at.units, at.axis)
    if at.units == 1:
        return None
    positional = ("x", "weights", "ids", "gate", "up", "down")
    kwargs: dict[str, Any] = {k: v for k, v in view.node.kwargs.items() if k not in positional}
    if which == 0:
        kwargs["own"] = LocalValues(tuple(range(at.units)), at.axis)
    elif "down_bias" in params:
        kwargs["share"] = LocalValues((1.0, *[0.0] * (at.units - 1)), at.axis)
    args = (x, weights, ids, *(params[n] for n in ("gate", "up", "down")))
    needs = [Exactly(at.units, at.axis, "it is summed over")]
    return Decision(whole, PARTIAL, args, kwargs, experts_of_rank, needs)


def _cut(view: View, params: dict[str, fx.Node]) -> tuple[Shard, int] | None:
    """How the first cut parameter is cut: over the experts, 0, or over their middle, 1."""
    for name, param in params.items():
        at = view.at(param)
        if isinstance(at, Shard) and at.dim in _DIMS[name]:
            return at, _DIMS[name].index(at.dim)
    return None


def _by_tokens(
    view: View, routed: tuple[fx.Node, ...], whole: dict[fx.Node, Placement]
) -> Decision | None:
    """Tokens are independent of each other; x's last dim must be whole, and so must k."""
    for node in routed:
        at = view.at(node)
        if isinstance(at, Shard):
            if at.dim == len(view.type(node).shape) - 1:
                return None
            return Decision(whole | dict.fromkeys(routed, at), at)
    return Decision(whole, REPLICATE)
