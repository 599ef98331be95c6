"""A lowered program -> the Python source of a vLLM model class."""

from __future__ import annotations

import compiler.emit.experts  # registers its builders
import compiler.emit.latent_attention  # noqa: F401 (its builders are registered)
from compiler.emit.model import emit_model

__all__ = ["emit_model"]
