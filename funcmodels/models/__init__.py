"""The zoo: one file a model family, each written as a user would write it."""

from funcmodels.models import llama

__all__ = ["llama"]
