"""Feed-forward layers of which each token uses a few: a mixture of experts."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from funcmodels.errors import ShapeError
from funcmodels.ops.grouped import grouped_linear
from funcmodels.ops.primitive import primitive

Activation = Literal["silu", "gelu", "gelu_tanh", "swigluoai"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "swigluoai")


@primitive
def experts(
    x: Float[Tensor, "*batch hidden"],
    weights: Float[Tensor, "*batch k"],
    ids: Int[Tensor, "*batch k"],
    gate: Float[Tensor, "experts mlp hidden"],
    up: Float[Tensor, "experts mlp hidden"],
    down: Float[Tensor, "experts hidden mlp"],
    *,
    gate_bias: Float[Tensor, "experts mlp"] | None = None,
    up_bias: Float[Tensor, "experts mlp"] | None = None,
    down_bias: Float[Tensor, "experts hidden"] | None = None,
    activation: Activation,
    alpha: float | None = None,
    limit: float | None = None,
) -> Float[Tensor, "*batch hidden"]:
    """The weighted sum of the gated feed-forward layers that each token was routed to.

    y = sum_j weights_j * (down[e] act(gate[e] x + gate_bias[e], up[e] x + up_bias[e])
    + down_bias[e]), with e = ids_j. Routing is the caller's: any plain torch that makes weights and
    ids, such as softmax and topk.

    act(g, u) is silu(g) * u, gelu(g) * u (exact, or its tanh approximation), or for "swigluoai"
    g * sigmoid(alpha * g) * (u + 1), with g at most limit and u within ±limit.

    Tokens are sorted by expert, so each is multiplied with the k experts it uses and no others.
    It differentiates to any order, forwards and backwards, by all but ids, and vectorises.

    Args:
        x: (*batch, hidden).
        weights: (*batch, k), of any floating dtype: the sum is taken in the wider one of the two.
        ids: (*batch, k), integers in [0, experts).
        gate, up, down: one matrix for each expert, of x's dtype.
        gate_bias, up_bias, down_bias: one vector for each expert, of x's dtype.
        activation: no default, since models differ.
        alpha, limit: of "swigluoai", which needs both; the others have none.
    Returns:
        (*batch, hidden), dtype of x.
    Raises:
        ShapeError: shapes or dtypes that do not fit, or an activation with wrong constants.
    Source: Shazeer et al. 2017, arXiv:1701.06538; `transformers` mixtral, gpt_oss.
    """
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    _check_shapes(x, weights, ids, gate, up, down, biases)
    _check_activation(activation, alpha, limit)
    return mixture(
        x,
        weights,
        ids,
        gate,
        up,
        down,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        activation=activation,
        alpha=alpha,
        limit=limit,
    )


def mixture(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: Activation,
    alpha: float | None = None,
    limit: float | None = None,
    first: int | None = None,
) -> Tensor:
    """`experts` without its checks; or, of all experts, what those from `first` on contribute."""
    k, batch, count = ids.shape[-1], x.shape[:-1], gate.shape[0]
    ids, weights = ids.reshape(-1).long(), weights.reshape(-1, k)
    if first is not None:
        ids = ids - first
        here = (ids >= 0) & (ids < count)
        weights = torch.where(here.reshape(-1, k), weights, 0)
    order = ids.argsort(stable=True)  # pairs of a token and an expert, by expert
    at = ids.index_select(0, order)
    expert = torch.arange(count, device=ids.device)
    bounds = torch.searchsorted(at, torch.stack([expert, expert + 1], -1))  # (experts, 2)
    if first is not None:
        at = at.clamp(0, count - 1)
    rows = x.reshape(-1, x.shape[-1]).index_select(0, order // k)

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = grouped_linear(rows, weight, bounds)
        return y if bias is None else y + bias.index_select(0, at)

    h = _act(linear(rows, gate, gate_bias), linear(rows, up, up_bias), activation, alpha, limit)
    y = linear(h, down, down_bias).index_select(0, order.argsort())
    y = y.unflatten(0, (-1, k))  # (tokens, k, hidden), as ids were
    y = (y * weights[..., None]).sum(-2)
    return y.to(x.dtype).reshape(*batch, x.shape[-1])


def _act(
    gate: Tensor, up: Tensor, activation: Activation, alpha: float | None, limit: float | None
) -> Tensor:
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "swigluoai":
        assert alpha is not None
        assert limit is not None
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def _check_activation(activation: str, alpha: float | None, limit: float | None) -> None:
    if activation not in ACTIVATIONS:
        raise ShapeError(
            "experts: no such activation",
            got=repr(activation),
            need=f"one of {', '.join(ACTIVATIONS)}",
            fix="one of these: vLLM's experts have no others",
        )
    given = [n for n, v in (("alpha", alpha), ("limit", limit)) if v is not None]
    wanted = ["alpha", "limit"] if activation == "swigluoai" else []
    if given != wanted:
        raise ShapeError(
            f'experts: constants of the activation "{activation}"',
            got=" and ".join(given) or "none",
            need=" and ".join(wanted) or "none",
            fix="alpha=1.702, limit=7.0 are GPT-OSS's" if wanted else 'activation="swigluoai"',
        )


def _check_shapes(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    biases: dict[str, Tensor | None],
) -> None:
    matrices = {"gate": gate, "up": up, "down": down}
    if ids.is_floating_point() or weights.shape != ids.shape or ids.shape[:-1] != x.shape[:-1]:
        raise ShapeError(
            "experts: each token has k weights and the ids of k experts",
            got=f"{_shapes(x=x, weights=weights, ids=ids)}, ids {ids.dtype}",
            need=f"weights and ids ({', '.join(map(str, (*x.shape[:-1], 'k')))}), integer ids",
            fix="weights, ids = probabilities.topk(k, dim=-1)",
        )
    sizes = (*gate.shape[:1], *gate.shape[1:2], x.shape[-1])
    right = gate.dim() == 3 and gate.shape == up.shape == sizes
    if not right or down.shape != (sizes[0], sizes[2], sizes[1]):
        raise ShapeError(
            "experts: the matrices do not fit each other or x",
            got=_shapes(x=x, **matrices),
            need=f"gate and up (experts, mlp, {x.shape[-1]}), down (experts, {x.shape[-1]}, mlp)",
            fix='P("experts mlp hidden") for gate and up, P("experts hidden mlp") for down',
        )
    for name, bias in biases.items():
        want = (sizes[0], sizes[2] if name == "down_bias" else sizes[1])
        if bias is not None and bias.shape != want:
            raise ShapeError(
                f"experts: {name} must hold one vector for each expert",
                got=_shapes(**{name: bias}),
                need=f"{name} {want}",
                fix=f'P("experts {"hidden" if name == "down_bias" else "mlp"}")',
            )
    given = matrices | {name: b for name, b in biases.items() if b is not None}
    if any(t.dtype != x.dtype for t in given.values()):
        raise ShapeError(
            "experts: parameters of another dtype than x",
            got=", ".join(f"{name} {t.dtype}" for name, t in {"x": x, **given}.items()),
            need="one dtype; weights may differ",
            fix=f"x.to({gate.dtype})",
        )


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
