"""Sharding rules: for a torch function or an op, what its inputs must be and what its output is.

A rule sees the placements its operands have along one mesh axis and returns a `Decision`: the
placements they are to have (the partitioner inserts the collectives), the output's, and the
arguments of the local operation where they differ. It returns None where it knows no way, and the
operands are gathered, which is always right.
"""

from __future__ import annotations

# Importing the files of rules registers them.
from compiler.rules import (
    along_dim,
    bits,
    channels,
    convolution,
    elementwise,
    latent_attention,
    loss,
    making,
    matrices,
    mixture,
    model_ops,
    over_ranks,
    parts,
    products,
    shapes,
    two_along_dim,
    written,
)
from compiler.rules.decide import decide, gathered, is_cut, told_apart
from compiler.rules.local import (
    LocalValues,
    max_over_ranks,
    more_than_zero,
    rms_norm_over_ranks,
    share_of_mean,
    vocab_embed,
    widened,
)
from compiler.rules.loss import cross_entropy_over_ranks
from compiler.rules.products import letters_of
from compiler.rules.rule import RULES, TOKENS, Decision, Exactly, Spelled, Steps, View

__all__ = [
    "RULES",
    "TOKENS",
    "Decision",
    "Exactly",
    "LocalValues",
    "Spelled",
    "Steps",
    "View",
    "along_dim",
    "bits",
    "channels",
    "convolution",
    "cross_entropy_over_ranks",
    "decide",
    "elementwise",
    "gathered",
    "is_cut",
    "latent_attention",
    "letters_of",
    "loss",
    "making",
    "matrices",
    "max_over_ranks",
    "mixture",
    "model_ops",
    "more_than_zero",
    "over_ranks",
    "parts",
    "products",
    "rms_norm_over_ranks",
    "shapes",
    "share_of_mean",
    "told_apart",
    "two_along_dim",
    "vocab_embed",
    "widened",
    "written",
]
