"""Where in the user's code something was written: every error and every graph node names it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import FrameType, ModuleType

import einops
import torch


def _folder(module: ModuleType) -> str:
    return os.path.dirname(os.path.abspath(str(module.__file__))) + os.sep


_PACKAGE = os.path.dirname(os.path.abspath(__file__))
# Frames of these are ours or the libraries'; the first frame outside them is the user's. The zoo
# under funcmodels/models is written as users write, and counts as theirs.
_NOT_USERS = (
    _PACKAGE + os.sep,
    os.path.join(os.path.dirname(_PACKAGE), "compiler") + os.sep,
    _folder(torch),  # wherever it is installed: site-packages, dist-packages, a checkout
    _folder(einops),
)
_ZOO = os.path.join(_PACKAGE, "models") + os.sep


@dataclass(frozen=True)
class SourceLine:
    """A line of a user's file, printed as `my_model.py:21 in attention`."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line} in {self.function}"


def users_line() -> SourceLine:
    """The innermost line on the call stack that is the user's own.

    A graph of `torch.compile` has no call stack: there, it is not known.
    """
    if torch.compiler.is_compiling():
        return SourceLine("compiled", 0, "torch.compile")
    frame: FrameType | None = sys._getframe(1)
    last = frame
    while frame is not None and not is_users(frame.f_code.co_filename):
        last, frame = frame, frame.f_back
    at = frame or last
    assert at is not None
    return SourceLine(at.f_code.co_filename, at.f_lineno, at.f_code.co_name)


_KNOWN: dict[str, bool] = {}


def is_users(filename: str) -> bool:
    """Whether a file is the user's: in the zoo, or outside our packages and the libraries."""
    known = _KNOWN.get(filename)
    if known is None:
        known = filename.startswith(_ZOO) or not filename.startswith(("<", *_NOT_USERS))
        _KNOWN[filename] = known
    return known
