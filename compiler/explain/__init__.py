"""What became of a model: counted, estimated, printed, drawn."""

from compiler.explain.explain import ExplainError, explain
from compiler.explain.report import Explanation
from compiler.explain.roofline import DEVICES, Device, Estimate

__all__ = ["DEVICES", "Device", "Estimate", "ExplainError", "Explanation", "explain"]
