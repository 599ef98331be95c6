"""A vocabulary padded as vLLM's layers pad theirs, for what runs without them: `fm.verify`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from compiler import layers
from compiler.check import padded
from compiler.partition import Partitioned
from compiler.placement import Shard
from funcmodels import tree
from funcmodels.spec import Model, Param


def pad_vocabulary(
    model: Model, weights: Any, program: Partitioned, tp: int
) -> tuple[Model, Any] | None:
    """The same function with rows of zeros for words that are none; None where that is no help."""
    sizes = {
        (at.axis, at.units): padded(at.units)
        for block in program.all()
        for node in block.graph.nodes
        if node.target in (layers.vocab_embedding, layers.logits)
        and isinstance(at := node.args[1].meta["placement"], Shard)  # type: ignore[union-attr]
        and at.units % tp
        and padded(at.units) % tp == 0
    }
    if not sizes:
        return None
    done: dict[int, Param] = {}  # a tied table stays one

    def more(param: Param) -> Param:
        shape = tuple(sizes.get(key, key[1]) for key in zip(param.axes, param.shape, strict=True))
        same = shape == param.shape
        return done.setdefault(id(param), param if same else replace(param, shape=shape, hf=None))

    given = {f.name: getattr(model, f.name) for f in fields(Model)}
    params = tree.map(more, model.params)

    def rows(value: Tensor, param: Param) -> Tensor:
        added = [n - have for n, have in zip(param.shape, value.shape, strict=True)]
        return F.pad(value, [w for n in reversed(added) for w in (0, n)])

    return Model(**given | {"params": params}), tree.map(rows, weights, params)
