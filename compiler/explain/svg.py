"""The few shapes that a diagram is made of, as SVG text."""

from __future__ import annotations

from html import escape

# Widths of characters at a font size of 1, of the widest of the fonts that a page may be shown in.
MONO, SANS, BOLD = 0.602, 0.58, 0.66


def fitted(text: str, width: float, size: float, font: float = SANS) -> str:
    """A name cut in its middle, where both its ends tell something, to what has room."""
    room = max(4, int(width / (size * font)))
    if len(text) <= room:
        return text
    head = (room - 1) // 2
    return f"{text[:head]}…{text[len(text) - (room - 1 - head) :]}"


def begun(text: str, width: float, size: float) -> str:
    """A sentence cut at its end."""
    room = max(4, int(width / (size * SANS)))
    return text if len(text) <= room else f"{text[: room - 1].rstrip()}…"


def text(x: float, y: float, content: str, css: str, *, end: bool = False) -> str:
    """A line of text; `end` for one that ends at x."""
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x:g}" y="{y:g}" class="{css}"{anchor}>{escape(content)}</text>'


def rect(x: float, y: float, w: float, h: float, css: str, radius: float = 8) -> str:
    """A rectangle with round corners."""
    size = f'width="{w:g}" height="{h:g}"'
    return f'<rect x="{x:g}" y="{y:g}" {size} rx="{radius:g}" class="{css}"/>'


def path(d: str, css: str, more: str = "") -> str:
    """A line."""
    return f'<path d="{d}" class="{css}"{more}/>'


def group(content: list[str], css: str, title: str = "", more: str = "") -> str:
    """Shapes together; the title is what a browser shows when they are pointed at."""
    head = f"<title>{escape(title)}</title>" if title else ""
    return f'<g class="{css}"{more}>{head}{"".join(content)}</g>'
