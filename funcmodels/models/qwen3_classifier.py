"""Qwen3 as a classifier of sequences: a score for each label, from the last token's hidden state.

The decoder is models/qwen3.py. Scores become probabilities, and one label's a sigmoid, unless
`problem_type` is "regression". Reward models are published in this form, too.

Checked with: tiny random `transformers` models; the configs of two reward models. Published weights
were not run.
Not supported: several labels at once (`problem_type`), padding inside a sequence.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import funcmodels as fm
from funcmodels.models import hf_config, qwen3
from funcmodels.models.hf_config import unless_given
from funcmodels.ops import einsum


@dataclass(frozen=True, kw_only=True)
class Config(qwen3.Config):
    """Qwen3's, and what is scored."""

    ONLY = {**qwen3.Config.ONLY, "problem_type": ("single_label_classification", "regression")}

    num_labels: int = unless_given(hf_config.labels_of)
    problem_type: str | None = None


def params(cfg: Config) -> dict[str, Any]:
    """Qwen3's parameters, with scores in the place of the vocabulary's logits."""
    P = fm.axes(labels=cfg.num_labels, hidden=cfg.hidden_size)
    decoder = {key: p for key, p in qwen3.params(cfg).items() if key != "head"}
    return {**decoder, "score": P("labels hidden", hf="score.weight")}


def forward(
    params: Any,
    tokens: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    *,
    cfg: Config,
) -> Tensor:
    """Scores (*batch, seq, labels) of tokens (*batch, seq), of which the last token's count."""
    x = qwen3.hidden(params, tokens, positions, segment_ids, cfg)
    return einsum(x, params["score"], "... e, l e -> ... l")


def model(cfg: Config) -> fm.Model:
    """The classifier of a config."""
    return fm.Model(
        "FmQwen3ForSequenceClassification",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("Qwen3ForSequenceClassification",),
        hf_ignored=("lm_head.weight",),
        task="classify",
        pooling="last",
        normalize=cfg.problem_type != "regression",
    )
