"""`fm.pad_heads`: heads of zeros, so that a number of ranks divides them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import gcd
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from compiler import collectives
from compiler.partition import Partitioned, partition
from compiler.passes.parameter_view import view_of
from compiler.placement import Partial, Shard
from compiler.rewrite import is_call
from compiler.trace import trace
from funcmodels import tree
from funcmodels.config_json import config_of
from funcmodels.errors import ShardingError
from funcmodels.parts import without_parts
from funcmodels.spec import Model, Param


@dataclass(frozen=True, eq=False)
class PaddedModel(Model):
    """A model that knows which of its heads are zeros, for `fm.explain`.

    Args:
        zeros: axis -> (heads that are none, all heads); the last ones are zeros.
    """

    zeros: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Padded:
    """A model with more heads than another, which are zeros and change nothing.

    Args:
        model: the model with the new sizes; save it, register it, serve it as any other. It tells
            `fm.explain` which heads are zeros; one that is loaded from a folder does not know.
        sizes: axis -> (size before, size now).
    """

    model: Model
    sizes: dict[str, tuple[int, int]]

    def pad(self, weights: Any) -> Any:
        """Weights of the model that was padded -> weights of this one."""

        def one(value: Tensor, param: Param) -> Tensor:
            added = [n - have for n, have in zip(param.shape, value.shape, strict=True)]
            return F.pad(value, [w for n in reversed(added) for w in (0, n)])

        return tree.map(one, weights, self.model.params)

    def unpad(self, weights: Any) -> Any:
        """The other way round: weights of this model -> of the one that was padded."""

        def one(value: Tensor, param: Param) -> Tensor:
            for dim, axis in enumerate(param.axes):
                if axis in self.sizes:
                    value = value.narrow(dim, 0, self.sizes[axis][0])
            return value

        return tree.map(one, weights, self.model.params)


def pad_heads(
    model: Model, tp: int, *, heads: str = "heads", kv_heads: str | None = "kv_heads"
) -> Padded:
    """A model whose heads `tp` ranks can divide: 9 heads, 3 KV heads become 12 and 4 for tp 2 or 4.

    Each group of query heads keeps its KV head; whole groups of zeros are added at the end. Their
    output meets zeros in the output projection, so logits stay the same, to rounding. The price is
    their share of the attention's weights, KV cache and time: `fm.explain(padded.model)` states it.

    Args:
        model: its forward must take the numbers of heads from its parameters' shapes.
        tp: the number of tensor-parallel ranks to serve it on.
        heads, kv_heads: the names of the axes; a model without `kv_heads` has one a head.
    Raises:
        ShardingError: an axis that no parameter has; or forward computes with all heads at once in
            a way that zeros would change, as a mean over heads.
        TraceError: forward has the number of heads from elsewhere.
    """
    before = _sizes(model, heads, kv_heads)
    if tp < 1:
        raise ShardingError(f"{tp} ranks", need="tp of at least 1", fix="pad_heads(model, tp=2)")
    kv = before.get(str(kv_heads), before[heads])
    group = before[heads] // kv
    new_kv = next(n for n in range(kv, kv + tp + 1) if _fits(n, group, tp))
    now = {heads: group * new_kv} | ({str(kv_heads): new_kv} if kv_heads in before else {})
    sizes = {axis: (before[axis], n) for axis, n in now.items() if n != before[axis]}

    def pad(param: Param) -> Param:
        shape = tuple(now.get(a, n) for a, n in zip(param.axes, param.shape, strict=True))
        # The rows of a tensor that several parameters share count heads: each has its own then.
        is_part = any(name in sizes for name in param.axes) and without_parts(param.hf or "") != (
            param.hf or ""
        )
        return replace(param, shape=shape, hf=None if is_part else param.hf)

    config = config_of(model)
    config |= {"num_attention_heads": now[heads], "num_key_value_heads": new_kv}
    if config.get("hidden_size", 0) % now[heads]:
        config["model_type"] = "funcmodels"  # transformers refuses such a config for its own types
    given = {f.name: getattr(model, f.name) for f in fields(Model)}
    given |= {"params": _map_shared(pad, model.params), "hf_config": config}
    first = model.zeros if isinstance(model, PaddedModel) else {}
    zeros = {axis: (first.get(axis, (n, n))[0], now[axis]) for axis, (n, _) in sizes.items()}
    padded = PaddedModel(**given, zeros={**first, **zeros})
    if sizes:
        _check_zeros(partition(trace(padded), _mesh_axis(padded, heads)), set(sizes))
    return Padded(padded, sizes)


def _sizes(model: Model, heads: str, kv_heads: str | None) -> dict[str, int]:
    """The one size of each of the two axes."""
    found: dict[str, int] = {}
    for param in model.by_path.values():
        for axis, n in zip(param.axes, param.shape, strict=True):
            if axis in (heads, kv_heads) and found.setdefault(axis, n) != n:
                raise ShardingError(
                    f'axis "{axis}" has two sizes in {model.name}',
                    got=f"{found[axis]} and {n}",
                    need="one number of heads in all layers",
                    from_=param.where,
                    fix="name the axes of the two kinds of layers apart",
                )
    if heads not in found:
        raise ShardingError(
            f'no parameter of {model.name} has an axis "{heads}"',
            need="the name of the axis that counts heads",
            fix='pad_heads(model, tp, heads="...")',
        )
    return found


def _fits(kv: int, group: int, tp: int) -> bool:
    """Whether ranks can divide KV heads, or hold one of them together, and divide the heads."""
    return gcd(kv, tp) in (kv, tp) and group * kv % tp == 0


def _map_shared(fn: Any, params: Any) -> Any:
    """As `tree.map`, with a parameter that stands in several places staying one."""
    done: dict[int, Param] = {}
    return tree.map(lambda p: done.setdefault(id(p), fn(p)), params)


def _mesh_axis(model: Model, heads: str) -> str:
    mesh = model.table.get(heads)
    if mesh is None:
        raise ShardingError(
            f'axis "{heads}" is not sharded',
            got=f"sharding {model.table}",
            need="heads that are divided over ranks: else there is nothing to pad them for",
            fix=f'sharding={{"{heads}": "tp", ...}}',
        )
    return mesh


def _check_zeros(program: Partitioned, axes: set[str]) -> None:
    """Refuse what takes all heads together, but in a product with parameters, which are zeros."""
    for block in program.all():
        for node in block.graph.nodes:
            if node.op != "call_function":
                continue
            cut = [n for n in node.all_input_nodes if _axis_of(n) in axes]
            summed = isinstance(node.meta["placement"], Partial)
            if is_call(node, collectives.all_gather) and cut:
                raise _mixes(node, _axis_of(cut[0]))
            if summed and cut and not any(map(view_of, cut)):
                raise _mixes(node, _axis_of(cut[0]))


def _axis_of(node: fx.Node) -> str | None:
    at = node.meta.get("placement")
    return at.axis if isinstance(at, Shard) else None


def _mixes(node: fx.Node, axis: str | None) -> ShardingError:
    return ShardingError(
        f'heads of zeros would change what is computed over axis "{axis}"',
        got=f"{getattr(node.target, '__name__', node.target)} takes all of them together",
        need="heads that meet in a product with a parameter alone",
        from_=node.meta["where"],
        fix="serve it on ranks that divide the heads: fm.check(model, tp=1) lists their numbers",
    )
