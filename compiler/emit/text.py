"""Layout of emitted source: calls that fit a line stay on it, others take a line an argument."""

from __future__ import annotations

WIDTH = 92


def call(head: str, args: list[str], indent: int, tail: str = "") -> list[str]:
    """`head(args)tail` on one line, or one argument a line."""
    pad = " " * indent
    one = f"{pad}{head}({', '.join(args)}){tail}"
    if len(one) <= WIDTH:
        return [one]
    return [f"{pad}{head}(", *(f"{pad}    {arg}," for arg in args), f"{pad}){tail}"]


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
    return repr(value)
