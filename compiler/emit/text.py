"""Layout of emitted source: calls that fit a line stay on it, others take a line an argument."""

from __future__ import annotations

import math

# What formatters take for a line by default.
WIDTH = 88


def call(head: str, args: list[str], indent: int, tail: str = "") -> list[str]:
    """`head(args)tail` on one line, or one argument a line."""
    pad = " " * indent
    one = f"{pad}{head}({', '.join(args)}){tail}"
    if len(one) <= WIDTH:
        return [one]
    return [f"{pad}{head}(", *(f"{pad}    {arg}," for arg in args), f"{pad}){tail}"]


def wrapped(line: str) -> list[str]:
    """A line, or where it is too long its brackets opened: one element a line."""
    text = line.lstrip(" ")
    indent = len(line) - len(text)
    found = _last_bracket(text) if len(line) > WIDTH else None
    if found is None:
        return [line]
    start, end = found
    inner = [part for part in _elements(text[start + 1 : end]) if part]
    pad = " " * indent
    out = [f"{pad}{text[: start + 1]}"]
    for part in inner:
        out += wrapped(f"{pad}    {part},")
    return [*out, f"{pad}{text[end:]}"]


def _last_bracket(text: str) -> tuple[int, int] | None:
    """The outermost bracket that closes last, when it holds something."""
    best: tuple[int, int] | None = None
    stack: list[int] = []
    for i, char in _code(text):
        if char in "([{":
            stack.append(i)
        elif char in ")]}" and stack:
            start = stack.pop()
            if not stack and i > start + 1:
                best = (start, i)
    return best


def _elements(text: str) -> list[str]:
    """What commas outside brackets and strings separate."""
    out, last, depth = [], 0, 0
    for i, char in _code(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            out.append(text[last:i].strip())
            last = i + 1
    return [*out, text[last:].strip()]


def _code(text: str) -> list[tuple[int, str]]:
    """The characters that are not in a string, with their places."""
    out: list[tuple[int, str]] = []
    quote = ""
    for i, char in enumerate(text):
        if quote:
            if char == quote and text[i - 1] != "\\":
                quote = ""
        elif char in "\"'":
            quote = char
        else:
            out.append((i, char))
    return out


def kwargs(settings: dict[str, str | None]) -> list[str]:
    """`name=value` for each value that is not None."""
    return [f"{name}={value}" for name, value in settings.items() if value is not None]


def table(name: str, rows: dict[str, str], indent: int = 0) -> list[str]:
    """`name = {key: value, ...}`, a row a line; keys and values are source text."""
    pad = " " * indent
    if not rows:
        return [f"{pad}{name} = {{}}"]
    return [f"{pad}{name} = {{", *(f"{pad}    {k}: {v}," for k, v in rows.items()), f"{pad}}}"]


def quoted(text: str) -> str:
    """A string literal in double quotes, as formatters write them."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def literal(value: object) -> str:
    """A constant's source text."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(literal, value))
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)
