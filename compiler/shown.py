"""Numbers and tables as text."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console


def shown(renderable: Any, width: int = 140) -> str:
    """What rich would print, as plain text."""
    text = io.StringIO()
    Console(file=text, width=width).print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def bytes_text(size: float) -> str:
    """1152 as `1.15 kB`."""
    return quantity(size, "B")


def quantity(value: float, unit: str) -> str:
    """Three digits and a prefix: 2.4e13, "FLOP" as `24 TFLOP`."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while value >= 999.5 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    return f"{value:.3g} {prefixes[0]}{unit}"


def seconds_text(seconds: float) -> str:
    """0.0021 as `2.1 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
