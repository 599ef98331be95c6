"""Model functions that are refused: the model around one, and how its refusal is looked at.

Each such function would be silently wrong if it were recorded: frozen to what tracing saw.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import funcmodels as fm
from compiler.trace import trace
from funcmodels import ops
from funcmodels.errors import TraceError
from tests.compiler.programs import axes, small

P = axes()
PARAMS = {"w": P("hidden"), "m": P("mlp hidden"), "layers": [{"w": P("hidden")} for _ in range(3)]}


def model_of(body: Any, outer: bool = False) -> fm.Model:
    """embed -> body -> unembed; with `outer`, the body is the whole forward."""

    def forward(params, tokens, positions, segment_ids=None):
        if outer:
            return body(params, tokens, positions)
        x = ops.embed(tokens, params["embed"])
        return ops.unembed(body(params, x, positions), params["head"])

    return small(forward, PARAMS)


def refused(body: Any, match: str, fix: str, line: str | None = None, outer: bool = False) -> None:
    """Tracing raises, saying `match`, the fix, and the line of the body that holds `line`."""
    with pytest.raises(TraceError, match=match) as error:
        trace(model_of(body, outer))
    assert re.search(fix, error.value.lines["fix"]), error.value
    if line is not None:
        source, first = inspect.getsourcelines(body)
        file = Path(inspect.getfile(body)).name
        number = first + next(i for i, text in enumerate(source) if line in text)
        assert str(error.value.lines["from"]).startswith(f"{file}:{number} in "), error.value
