"""The settings of `ops.rope` as vLLM's `get_rope` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ServedRope:
    """What `get_rope` is given, and how far its table of angles is right.

    Args:
        parameters: its `rope_parameters`.
        table: how many positions its table has, where the kind fixes that.
        check: what of `compiler.vllm_checks` compares the engine's longest sequence with the
            length up to which it computes what the model does; that length, and the kind of rope.
    """

    parameters: dict[str, Any]
    table: int | None = None
    check: tuple[str, int, str] | None = None


def served_rope(settings: Mapping[str, Any], head_dim: int) -> ServedRope:
    """From theta, scaling, rotary_dim and max_position, as `ops.rope` takes them."""
    scaling = dict(settings.get("scaling") or {})
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    limit = settings.get("max_position")
    out: dict[str, Any] = {"rope_type": kind, "rope_theta": settings["theta"]}
    if settings.get("rotary_dim") not in (None, head_dim):
        out["rope_dim"] = settings["rotary_dim"]
    if kind == "dynamic":  # equal to no scaling up to the limit, and not servable above it
        limit = scaling.get("original_max_position_embeddings") or limit
        assert limit is not None
        return ServedRope({**out, "rope_type": "default"}, check=("check_length", limit, kind))
    check = table = None
    if kind == "longrope":
        table = limit
        limit = scaling.get("original_max_position_embeddings") or limit
        assert limit is not None
        check = "warn_length", limit, kind
        scaling["original_max_position_embeddings"] = limit
        if (factor := scaling.pop("attention_factor", None)) is not None:
            scaling |= {"short_mscale": factor, "long_mscale": factor}
    if kind == "yarn":
        scaling.setdefault("original_max_position_embeddings", limit)
        if "factor" not in scaling:
            scaling["factor"] = limit / scaling["original_max_position_embeddings"]
        table = int(scaling["factor"] * scaling["original_max_position_embeddings"])
    lists = {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in scaling.items()}
    return ServedRope({**out, **lists}, table, check)
