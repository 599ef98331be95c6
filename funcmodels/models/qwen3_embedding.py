"""Qwen3 as an embedding model: the decoder of models/qwen3.py without its logits.

One vector a sequence by `pooling`, of length 1 with `normalize`: `fm.load_model` reads both from
modules.json, as sentence-transformers writes it, or from config.json.

Checked with: tiny random `transformers` models; the configs of Qwen3-Embedding-0.6B and 8B.
Published weights were not run.
Not supported: attention to both sides, instructions before the text (write them into it).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

import funcmodels as fm
from funcmodels.models import qwen3
from funcmodels.models.decoder import without_logits


@dataclass(frozen=True, kw_only=True)
class Config(qwen3.Config):
    """Qwen3's; `pooling` and `normalize` are ours."""

    ONLY = {**qwen3.Config.ONLY, "pooling": ("last", "mean", "cls")}

    pooling: Literal["last", "mean", "cls"]
    normalize: bool = False


def params(cfg: Config) -> dict[str, Any]:
    """Qwen3's parameters but the logits'."""
    return without_logits(qwen3.params(cfg))


def forward(
    params: Any,
    tokens: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    *,
    cfg: Config,
) -> Tensor:
    """Hidden states (*batch, seq, hidden) of tokens (*batch, seq)."""
    return qwen3.hidden(params, tokens, positions, segment_ids, cfg)


def model(cfg: Config) -> fm.Model:
    """The embedding model of a config."""
    return fm.Model(
        "FmQwen3Model",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("Qwen3Model",),
        hf_ignored=("lm_head.weight",),
        hf_prefix="model.",  # of checkpoints that generate text
        task="embed",
        pooling=cfg.pooling,
        normalize=cfg.normalize,
    )
