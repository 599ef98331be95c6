"""The block diagram: what is served, from tokens to logits, top to bottom.

Boxes are layers, frames are blocks, dashed boxes are what is left to plain torch, and bars in the
signal colour are collectives. What skips a box runs down at its right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compiler.explain.flow import Skip, flow
from compiler.explain.folding import Repeat, numbers_text
from compiler.explain.records import BlockView, Parameter, Step
from compiler.explain.svg import BOLD, MONO, SANS, begun, fitted, group, path, rect, text
from compiler.shown import bytes_text

if TYPE_CHECKING:
    from compiler.explain.report import Explanation

WIDTH = 720
_GAP = 22  # between boxes: room for an arrow
_PAD = 18  # inside a frame
_LANE = 8  # between lines that skip boxes
_LANES = 5  # at most: more would be a cable, not a picture
_HEAD = 40  # a frame's title


@dataclass
class _Canvas:
    """What is drawn so far, back to front."""

    shapes: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def diagram(found: Explanation) -> str:
    """The whole model as one SVG element."""
    canvas = _Canvas()
    blocks = {block.name: block for block in found.blocks}
    body, head = found.blocks[0], found.blocks[-1]
    y = _pill(canvas, 14, "tokens", "tokens")
    y = _Drawing(canvas, found, blocks).steps(body, 30, y + _GAP, WIDTH - 60)
    y = _Drawing(canvas, found, blocks).steps(head, 30, y + _GAP, WIDTH - 60)
    canvas.lines.append(path(f"M{WIDTH / 2:g},{y + 1:g} v{_GAP - 3}", "flow", _TIP))
    y = _pill(canvas, y + _GAP, "logits" if head.steps else "pooled", "logits")
    drawn = "".join([*canvas.shapes, *canvas.lines])
    size = f'viewBox="0 0 {WIDTH} {y + 14:g}" width="{WIDTH}" height="{y + 14:g}"'
    label = f'role="img" aria-label="Block diagram of {found.model}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>{_MARKERS}{drawn}</svg>'


_MARKERS = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M1,1 L7,4 L1,7" class="tip"/></marker></defs>'
)

_TIP = ' marker-end="url(#tip)"'


def _pill(canvas: _Canvas, y: float, label: str, css: str) -> float:
    """The beginning or the end of everything."""
    w = 96
    canvas.shapes.append(rect(WIDTH / 2 - w / 2, y, w, 28, f"pill {css}", 14))
    canvas.shapes.append(
        f'<text x="{WIDTH / 2:g}" y="{y + 18.5:g}" class="pilltext" '
        f'text-anchor="middle">{label}</text>'
    )
    return y + 28


class _Drawing:
    """Draws one block's steps, and the frames of the blocks that it calls."""

    def __init__(
        self, canvas: _Canvas, found: Explanation, blocks: dict[str, BlockView], depth: int = 0
    ) -> None:
        self.canvas = canvas
        self.found = found
        self.blocks = blocks
        self.depth = depth

    def steps(self, block: BlockView, x: float, y: float, w: float) -> float:
        """Draw a block's steps from y on; returns where they end."""
        top = y - _GAP
        found = flow(block, _LANES)
        w -= _LANE * max(0, found.lanes - 1)
        ends: list[tuple[float, float]] = []
        for item in found.items:
            start = y
            if isinstance(item, Repeat):
                y = self._repeat(item, x, y, w)
            elif item.kind == "block":
                y = self._frame(item, self.blocks[item.title], x, y, w)
            else:
                y = self._box(block, item, x, y, w)
            ends.append((start, y))
            y += _GAP
        for i in found.down:
            start = ends[i - 1][1] if i else top + 2
            self._arrow(x + w / 2, start + 1, ends[i][0] - 2)
        for skip in found.skips:
            y0 = ends[skip.start][1] - 10 if skip.start >= 0 else top + 6
            self._skip(skip, x + w, y0, ends, y - _GAP + 10)
        return y - _GAP

    def _arrow(self, x: float, start: float, end: float) -> None:
        self.canvas.lines.append(path(f"M{x:g},{start:g} V{end:g}", "flow", _TIP))

    def _skip(
        self, skip: Skip, x: float, start: float, ends: list[tuple[float, float]], bottom: float
    ) -> None:
        """Out of a box at its right, down a lane, and into a later box, or on out of the block."""
        out = x + 10 + skip.lane * _LANE
        d = f"M{x:g},{start:g} H{out - 4:g} q4,0 4,4 "
        if skip.end < len(ends):
            y = ends[skip.end][0] + 14
            d += f"V{y - 4:g} q0,4 -4,4 H{x + 2.5:g}"
        else:
            d += f"V{bottom:g}"
        self.canvas.lines.append(path(d, "skip", _TIP))

    # Boxes

    def _box(self, block: BlockView, step: Step, x: float, y: float, w: float) -> float:
        """A layer, or an operation of torch's, with its collective below it."""
        where = f"{step.where}\n{step.text}"
        if step.kind == "collective":
            shapes = self._bar(step, x, y - 4, w)
            self.canvas.shapes.append(group(shapes, "step", where, _data(block, step)))
            return y + 22
        held = held_by(block, step)
        plain = step.kind == "plain"
        h = 50.0 if not plain else 44.0
        segments = len(held) > 1 and len({p.part for p in held}) > 1
        if segments:
            h += 22
        css = f"box {kind_of(step)}"
        shapes = [rect(x, y, w, h, css), rect(x, y + 8, 4, h - 16, f"stripe {kind_of(step)}", 2)]
        room = w - 36
        shape = fitted(step.shape, room * 0.4, 11.5, MONO)
        left = room - len(shape) * 11.5 * MONO - 14
        title = step.code.split("\n")[0] if plain else step.attr
        shapes.append(text(x + 18, y + 20, fitted(title, left, 13, MONO), "name"))
        shapes.append(text(x + w - 14, y + 20, shape, "shape", end=True))
        size = sum(p.bytes for p in held)
        note = bytes_text(size) if size else "plain torch" if plain else ""
        kv = step.work.kv_bytes
        if kv:
            note = f"KV {bytes_text(kv)}/token"
        below = begun(step.why if plain else step.title, room - 14 - len(note) * 12 * SANS, 12)
        shapes.append(text(x + 18, y + 37, below, "class"))
        shapes.append(text(x + w - 14, y + 37, note, "class", end=True))
        if segments:
            shapes += _segments(held, x + 18, y + 46, w - 32)
        bottom = y + h
        if step.collective is not None:
            shapes += self._bar(step, x, bottom, w)
            bottom += 26
        self.canvas.shapes.append(group(shapes, "step", where, _data(block, step)))
        return bottom

    def _bar(self, step: Step, x: float, y: float, w: float) -> list[str]:
        """A collective, below what it is of."""
        assert step.collective is not None
        per = "sampled token" if step.collective.is_per_sample else "token"
        label = f"⇄ {step.collective.kind} · {bytes_text(step.collective.bytes)} a {per}"
        return [
            rect(x, y + 4, w, 22, "collective", 6),
            text(x + 18, y + 19.5, begun(label, w - 80, 12), "collectivetext"),
            text(x + w - 14, y + 19.5, f"tp {self.found.tp}", "collectivetext", end=True),
        ]

    # Frames

    def _frame(self, step: Step, block: BlockView, x: float, y: float, w: float) -> float:
        """A block that is called: its steps in a frame."""
        at = len(self.canvas.shapes)
        inner = _Drawing(self.canvas, self.found, self.blocks, self.depth + 1)
        bottom = inner.steps(block, x + _PAD, y + _HEAD, w - 2 * _PAD) + _PAD
        shapes = [rect(x, y, w, bottom - y, f"frame d{min(self.depth, 2)}", 12)]
        attr = "" if step.attr.rpartition(".")[2].isdigit() else step.attr
        shapes += _frame_title(attr or block.name, _settings(block, attr), x, y, w)
        title = f"{block.where}\n{step.text}" if block.where else step.text
        self.canvas.shapes.insert(at, group(shapes, "block", title))
        return bottom

    def _repeat(self, item: Repeat, x: float, y: float, w: float) -> float:
        """The layers: each kind once, on a pile of sheets."""
        at = len(self.canvas.shapes)
        total = sum(map(len, item.numbers))
        inner_top = y + 66
        bottom = inner_top
        several = len(item.steps) > 1
        for kind, (step, numbers) in enumerate(zip(item.steps, item.numbers, strict=True)):
            block = self.blocks[step.title]
            if several:
                start = len(self.canvas.shapes)
                inner = _Drawing(self.canvas, self.found, self.blocks, self.depth + 1)
                fx, fw = x + _PAD, w - 2 * _PAD
                end = inner.steps(block, fx + _PAD, bottom + _HEAD, fw - 2 * _PAD) + _PAD
                shapes = [rect(fx, bottom, fw, end - bottom, "frame d1", 12)]
                which = f"×{len(numbers)}: {numbers_text(numbers)}"
                shapes += _frame_title(block.name, which, fx, bottom, fw, indent=34)
                shapes.append(rect(fx + 16, bottom + 15, 11, 11, f"tick k{kind % 4}", 3))
                self.canvas.shapes.insert(start, group(shapes, "block", str(block.where)))
                bottom = end + _GAP
                if step is not item.steps[-1]:
                    self._arrow(fx + fw / 2, end + 1, bottom - 2)
            else:
                inner = _Drawing(self.canvas, self.found, self.blocks, self.depth + 1)
                bottom = inner.steps(block, x + _PAD, inner_top + 4, w - 2 * _PAD) + _GAP
        bottom += _PAD - _GAP
        shapes = [
            rect(x + 10, y + 10, w - 10, bottom - y, "sheet", 12),
            rect(x + 5, y + 5, w - 5, bottom - y, "sheet", 12),
            rect(x, y, w - 5, bottom - y, "frame d0", 12),
        ]
        name = "layers" if several else item.steps[0].title
        shapes += _frame_title(name, f"×{total}", x, y, w - 5)
        shapes += self._strip(item, x + 18, y + 38, w - 40)
        where = self.blocks[item.steps[0].title].where
        self.canvas.shapes.insert(at, group(shapes, "block", str(where or "")))
        return bottom + 10

    def _strip(self, item: Repeat, x: float, y: float, w: float) -> list[str]:
        """Every layer as a tick, in the colour of its kind, in the groups of its stage."""
        kind = {n: k for k, numbers in enumerate(item.numbers) for n in numbers}
        cuts = len(self.found.stages) - 1
        labels = self.found.pp > 1
        gap = 10.0 if labels else 0.0
        each = (w - gap * cuts) / max(1, len(kind))
        out: list[str] = []
        at = x
        for i, stage in enumerate(self.found.stages):
            first = at
            for number in stage.layers:
                shown = max(0.8, each - (1.5 if each > 4 else 0.4))
                out.append(rect(at, y, shown, 8, f"tick k{kind.get(number, 0) % 4}", 1.5))
                at += each
            if labels and at - first > 60:
                name = f"stage {i}"
                out.append(text(first, y + 20, fitted(name, at - first, 10.5), "ticktext"))
            at += gap
        return out


def _settings(block: BlockView, attr: str) -> str:
    """A block's function, and what it was called with: `attention, window=64`."""
    given = [f"{name}={value}" for name, value in block.static if value != "None"]
    named = bool(attr) and not block.name.startswith(attr)
    return ", ".join([*([block.name] if named else []), *given])


def _frame_title(
    name: str, note: str, x: float, y: float, w: float, indent: float = 16
) -> list[str]:
    """A frame's name at its left, what is to be said of it at its right, an arrow between."""
    room = w / 2 - 34
    out = [text(x + indent, y + 25, fitted(name, room, 14, BOLD), "title")]
    if note:
        out.append(text(x + w - 30, y + 25, fitted(note, room, 12), "count", end=True))
    return out


def _segments(held: Sequence[Parameter], x: float, y: float, w: float) -> list[str]:
    """The parts of a fused layer, as wide as they are large."""
    total = sum(p.bytes for p in held)
    least = 34.0
    wide = [max(least, w * p.bytes / total) for p in held]
    scale = (w - 3 * (len(held) - 1)) / sum(wide)
    out, at = [], x
    for p, width in zip(held, wide, strict=True):
        width *= scale
        name = p.path.rpartition(".")[2]
        out.append(rect(at, y, width, 17, "segment", 4))
        out.append(text(at + 6, y + 12.5, fitted(name, width - 8, 11, MONO), "segmenttext"))
        at += width + 3
    return out


def held_by(block: BlockView, step: Step) -> list[Parameter]:
    """The parameters of a layer, or of a torch operation; of those that fold apart, the first."""
    found = {
        (p.name, p.part): p
        for p in reversed(block.parameters)
        if p.name in step.parameters and p.step in (step.name)
    }
    return list(reversed(found.values()))


def kind_of(step: Step) -> str:
    """What a step is coloured by."""
    if step.kind != "layer":
        return "torch" if step.kind == "plain" else "views"
    for part, kind in _KINDS:
        if part in step.title:
            return kind
    return "other"


_KINDS = (
    ("Linear", "linear"),
    ("Attention", "attention"),
    ("Embedding", "vocab"),
    ("LMHead", "vocab"),
    ("Norm", "norm"),
)


def _data(block: BlockView, step: Step) -> str:
    """What the page's script finds a step's details by."""
    return f' tabindex="0" data-step="{block.name}/{step.name}"'
