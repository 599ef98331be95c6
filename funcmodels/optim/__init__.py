"""Functional optimisers on pytrees: `init(weights) -> state`, `update(grads, state, weights)`.

    optimizer = fm.optim.adamw(fm.optim.cosine(3e-4, warmup=100, total=10_000), weight_decay=0.1)
    state = optimizer.init(weights)
    weights, state = optimizer.update(grads, state, weights)

Unlike optax's, `update` returns the new weights and not a difference to add: the kernels of torch
that do a whole step at once write weights, and a tree of differences is memory that they save.
"""

from funcmodels.optim.adamw import adamw
from funcmodels.optim.lion import lion
from funcmodels.optim.masks import Mask, matching, not_matching
from funcmodels.optim.muon import matrices, muon
from funcmodels.optim.optimizer import Optimizer
from funcmodels.optim.partition import frozen, partition
from funcmodels.optim.parts import sharded
from funcmodels.optim.schedules import Schedule, constant, cosine, linear, wsd
from funcmodels.optim.sgd import sgd
from funcmodels.optim.transforms import (
    Transform,
    chain,
    clip_by_global_norm,
    global_norm,
    scale_to_norm,
)

__all__ = [
    "Mask",
    "Optimizer",
    "Schedule",
    "Transform",
    "adamw",
    "chain",
    "clip_by_global_norm",
    "constant",
    "cosine",
    "frozen",
    "global_norm",
    "linear",
    "lion",
    "matching",
    "matrices",
    "muon",
    "not_matching",
    "partition",
    "scale_to_norm",
    "sgd",
    "sharded",
    "wsd",
]
