"""An explanation as one page that stands alone: totals, the diagram, and tables."""

from __future__ import annotations

import json
import linecache
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.explain.diagram import diagram, held_by, kind_of
from compiler.explain.records import BlockView, Parameter, Step
from compiler.explain.roofline import Phase
from compiler.explain.tables import (
    PADDING,
    PADDING_NOTE,
    collective_bytes,
    collective_rows,
    layout,
    padding_rows,
    padding_title,
    parameter_rows,
    plain_rows,
    remark,
    shape_text,
    times,
)
from compiler.shown import bytes_text, quantity, seconds_text
from funcmodels.errors import listed
from funcmodels.source import SourceLine

if TYPE_CHECKING:
    from compiler.explain.report import Explanation

_HERE = Path(__file__).parent
_KINDS = {
    "linear": "linear layers",
    "vocab": "embedding and output",
    "norm": "norms",
    "attention": "attention",
    "other": "other layers",
    "torch": "plain torch",
}


def page(found: Explanation) -> str:
    """The HTML of the page; it loads nothing."""
    details = {
        f"{block.name}/{step.name}": _details(found, block, step)
        for block in found.blocks
        for step in block.steps
        if step.kind in ("layer", "plain", "collective")
    }
    told = json.dumps(details).replace("<", "\\u003c")
    facts = f"{found.num_parameters:,} parameters · {layout(found)} · {found.dtype}"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(found.model)}</title>
<style>
{(_HERE / "page.css").read_text()}</style>
<main>
<h1>{escape(found.model)}</h1>
<p class="sub">{facts}</p>
{_cards(found)}
<h2>What a rank holds</h2>
{_memory(found)}
{_head_padding(found)}
{_roofline(found)}
<h2>What is served</h2>
<div class="picture">
{diagram(found)}
<aside>{_greeting(found)}</aside>
</div>
<h2>Parameters</h2>
{_parameters(found)}
<h2>Collectives</h2>
{_collectives(found)}
<h2>Left to plain torch</h2>
{_plain(found)}
</main>
<script type="application/json" id="details">{told}</script>
<script>
{(_HERE / "page.js").read_text()}</script>
</html>
"""


# Totals


def _cards(found: Explanation) -> str:
    fullest = max(found.stages, key=lambda stage: stage.weights)
    reduces = sum(n for stage in found.stages for n in stage.collectives.values())
    sent = sum(stage.collective_bytes for stage in found.stages)
    room = ""
    if found.estimate is not None:
        room = f"of {bytes_text(found.estimate.device.memory)}"
    elif found.tp * found.pp > 1:
        room = "on the fullest rank" if found.pp > 1 else "on each rank"
    cards = [
        _card("Weights", bytes_text(fullest.weights), room or "on one rank"),
        _card("KV cache", bytes_text(found.kv_per_token), f"a token, {found.kv_dtype}"),
        *_states(found),
        _card(
            "Collectives",
            f"{reduces:,}" if reduces else "none",
            f"a step, {bytes_text(sent)} a token" if reduces else "one rank has all it needs",
            "signal" if reduces else "",
        ),
    ]
    if found.pp > 1:
        sizes = "–".join(map(str, sorted({len(stage.layers) for stage in found.stages})))
        note = f"of {sizes} layers, {bytes_text(found.stages[0].sends)} a token between"
        cards.append(_card("Stages", str(found.pp), note))
    plain = sum(block.count for block, _ in found.plain)
    note = f"on {len({step.where for _, step in found.plain})} lines" if plain else "all is layers"
    cards.append(_card("Plain torch", f"{plain:,}" if plain else "nothing", note))
    return f'<div class="cards">{"".join(cards)}</div>'


def _states(found: Explanation) -> list[str]:
    """The card of recurrent states, of a model that has some."""
    size = found.state_per_sequence
    return [_card("States", bytes_text(size), "a sequence, however long")] if size else []


def _card(label: str, value: str, note: str, css: str = "") -> str:
    return (
        f'<div class="card {css}"><div class="label">{escape(label)}</div>'
        f'<div class="value">{escape(value)}</div><div class="note">{escape(note)}</div></div>'
    )


def _memory(found: Explanation) -> str:
    """The fullest rank's weights by what holds them, and what its device has left."""
    stage = max(range(found.pp), key=lambda i: found.stages[i].weights)
    sizes: dict[str, int] = {}
    for block in found.blocks:
        steps = {step.name: step for step in block.steps}
        for p in block.parameters:
            kind = kind_of(steps[p.step]) if p.step else "torch"
            sizes[kind] = sizes.get(kind, 0) + p.bytes * p.stages[stage]
    sizes = {kind: sizes[kind] for kind in _KINDS if sizes.get(kind)}
    parts = [(f"c-{kind}", _KINDS[kind], size) for kind, size in sizes.items()]
    total = sum(sizes.values())
    note = ""
    if found.estimate is not None:
        left = max(0, int(found.estimate.device.memory) - total)
        parts.append(("c-free", "free", left))
        note = (
            f'<p class="foot">Room for {found.estimate.kv_tokens:,} tokens of KV cache, '
            "activations aside.</p>"
        )
        total += left
    bar = "".join(
        f'<i class="{css}" style="flex:{size / total:.5f}"></i>' for css, _, size in parts
    )
    legend = "".join(
        f'<span><i class="{css}"></i>{name} <b>{bytes_text(size)}</b></span>'
        for css, name, size in parts
    )
    which = f"stage {stage}, " if found.pp > 1 else ""
    inside = f'<div class="label">{which}one rank</div><div class="bar">{bar}</div>'
    return f'<div class="card">{inside}<div class="legend">{legend}</div>{note}</div>'


def _head_padding(found: Explanation) -> str:
    """What heads of zeros cost."""
    if found.head_padding is None:
        return ""
    rows = [
        [*map(_cell, row[:3]), *map(_number, row[3:])] for row in padding_rows(found.head_padding)
    ]
    return (
        f"<h2>{escape(padding_title(found.head_padding))}</h2>"
        f'<div class="wide">{_table(PADDING, rows)}</div><p class="foot">{PADDING_NOTE}</p>'
    )


def _roofline(found: Explanation) -> str:
    """How long a step takes at best, and what of."""
    if found.estimate is None:
        return ""
    e = found.estimate
    d = e.device
    many = "sequence" if e.batch == 1 else "sequences"
    cards = "".join(
        (
            _phase(f"Prefill of {e.prefill.tokens:,} tokens", e.prefill),
            _phase(f"Decoding {e.batch:,} {many} at {e.decode.context:,} tokens", e.decode),
        )
    )
    facts = (
        f"{escape(d.name)}: {quantity(d.flops, 'FLOP/s')}, {quantity(d.bandwidth, 'B/s')} of "
        f"memory, {quantity(d.link, 'B/s')} of links. A roofline: real steps are slower."
    )
    return (
        f'<h2>How long a step takes, at best</h2><div class="times">{cards}</div>'
        f'<p class="foot">{facts}</p>'
    )


def _phase(what: str, phase: Phase) -> str:
    parts = {"compute": phase.compute, "memory": phase.memory, "links": phase.links}
    longest = max(parts.values()) or 1.0
    rows = "".join(
        f'<div class="row {"bound" if name == phase.bound else ""}"><span>{name}</span>'
        f'<div><i style="width:{100 * seconds / longest:.2f}%"></i></div>'
        f"<span>{seconds_text(seconds)}</span></div>"
        for name, seconds in parts.items()
    )
    return (
        f'<div class="card"><div class="label">{what}</div>'
        f'<div class="value">{seconds_text(phase.seconds)}</div>'
        f'<div class="note">{phase.tokens_per_second:,.0f} tokens a second, '
        f"bound by {phase.bound}</div>{rows}</div>"
    )


# The panel beside the diagram


def _greeting(found: Explanation) -> str:
    signs = "".join(
        f'<span><i class="{css}"></i>{name}</span>'
        for css, name in [
            *((f"c-{kind}", name) for kind, name in _KINDS.items()),
            ("c-signal", "collective: ranks wait for each other"),
        ]
    )
    return (
        "<h3>Point at a box</h3><p>The line that you wrote, and what became of it. "
        "A click keeps it here.</p>"
        f'<h4>Colours</h4><div class="legend" style="display:grid">{signs}</div>'
    )


def _details(found: Explanation, block: BlockView, step: Step) -> str:
    """What is told of a step."""
    held = held_by(block, step)
    parts = [
        f"<h3>{escape(step.attr or step.title)}</h3>",
        f"<p>{escape(step.title)}{escape(_every(block))}</p>",
    ]
    if step.why:
        parts.append(f"<p>Left to plain torch: {escape(step.why)}.</p>")
    parts += ["<h4>You wrote</h4>", f"<p>{escape(str(step.where))}</p>", _source(step.where)]
    parts += ["<h4>It runs</h4>", f"<pre>{escape(step.code)}</pre>"]
    told = [
        a for a in step.arguments if not a.startswith(("quant_config", "cache_config", "prefix"))
    ]
    if step.kind == "layer":
        inner = "".join(f"    {a},\n" for a in told)
        made = f"{step.title}(\n{inner})" if told else f"{step.title}()"
        parts += ["<h4>Made by</h4>", f"<pre>{escape(made)}</pre>"]
    if held:
        rows = [
            [_mono(p.path), _number(shape_text(p.local_shape)), _number(bytes_text(p.bytes))]
            for p in held
        ]
        parts += ["<h4>On a rank</h4>", _table(["parameter", "shape>", "bytes>"], rows)]
        notes = dict.fromkeys(remark(p, found.tp) for p in held)
        parts += [f"<p>{escape(note)}</p>" for note in notes if note]
    parts += _costs(step)
    return "".join(parts)


def _every(block: BlockView) -> str:
    return f" in each of {block.count} {block.name}" if block.count > 1 else f" in {block.name}"


def _costs(step: Step) -> list[str]:
    work, rows = step.work, []
    if work.flops:
        rows.append(["arithmetic", f"{quantity(work.flops, 'FLOP')} a token"])
    if work.attention_flops:
        rows.append(["arithmetic", f"{quantity(work.attention_flops, 'FLOP')} a pair of tokens"])
    if work.state_bytes:
        rows.append(["State", f"{bytes_text(work.state_bytes)} a sequence"])
    if work.kv_bytes:
        rows.append(["KV cache", f"{bytes_text(work.kv_bytes)} a token"])
    if work.cached:
        rows.append(["cached", work.cached])
    if work.window is not None:
        rows.append(["window", f"{work.window:,} tokens"])
    if step.collective is not None:
        rows.append([step.collective.kind, collective_bytes(step)])
        rows.append(["each rank sends", f"{bytes_text(step.collective.wire)} of them, by a ring"])
        rows.append(["because", step.collective.why])
    if not rows:
        return []
    cells = [[_cell(a, "soft"), _cell(b)] for a, b in rows]
    return ["<h4>It costs</h4>", _table([], cells)]


def _source(where: SourceLine, around: int = 3) -> str:
    """The lines about a line, itself marked."""
    first, last = max(1, where.line - around), where.line + around
    lines = [(n, linecache.getline(where.file, n).rstrip("\n")) for n in range(first, last + 1)]
    while lines and not lines[-1][1].strip() and lines[-1][0] != where.line:
        lines.pop()
    while lines and not lines[0][1].strip() and lines[0][0] != where.line:
        lines.pop(0)
    indents = [len(text) - len(text.lstrip()) for _, text in lines if text.strip()]
    cut = min(indents, default=0)
    out = []
    for n, text in lines:
        row = f'<span class="no">{n}</span>{escape(text[cut:])}'
        out.append(f'<span class="hit">{row}</span>' if n == where.line else f"{row}\n")
    return f"<pre>{''.join(out)}</pre>"


# Tables


def _parameters(found: Explanation) -> str:
    columns = ["parameter", "shape>", "on a rank>", "bytes>", "layer", "module", ""]
    rows: list[list[str] | str] = []
    for block in found.blocks:
        if block.parameters:
            where = f"<span>{escape(str(block.where))}</span>" if block.where else ""
            rows.append(f"{escape(block.name)}{times(block)}{where}")
            rows += [_parameter(found, p, name) for p, name in parameter_rows(block)]
    unread = f"Not read by forward, so not served: {listed(found.unread)}." if found.unread else ""
    foot = f'<p class="foot">{escape(unread)}</p>' if unread else ""
    return f'<div class="wide">{_table(columns, rows)}</div>{foot}'


def _parameter(found: Explanation, p: Parameter, name: str) -> list[str]:
    part = f" [{p.part}]" if p.part else ""
    tags = [name for name, yes in _tags(p) if yes]
    tags += [note] if (note := remark(p, found.tp)) else []
    return [
        _cell(name, "mono path"),
        _number(shape_text(p.shape)),
        _number(shape_text(p.local_shape)),
        _number(bytes_text(p.bytes)),
        _cell(p.layer),
        _cell(p.module + part, "mono path"),
        "<td>" + "".join(f'<span class="tag">{tag}</span>' for tag in tags) + "</td>",
    ]


def _tags(p: Parameter) -> Iterable[tuple[str, bool]]:
    return (("quantisable", p.is_quantisable), ("LoRA", p.is_lora_target))


def _collectives(found: Explanation) -> str:
    rows = [
        [
            _cell(step.collective.kind),
            _cell(str(step.where)),
            _cell(step.text, "mono line"),
            _cell(step.collective.why, "soft"),
            _number(collective_bytes(step)),
            _number(f"{count:,}"),
        ]
        for step, count in collective_rows(found)
        if step.collective is not None
    ]
    if not rows:
        return '<p class="foot">None: one rank has all that it needs.</p>'
    columns = ["which", "where", "line", "why", "bytes>", "times>"]
    return f'<div class="wide">{_table(columns, rows)}</div>'


def _plain(found: Explanation) -> str:
    rows = [
        [
            _cell(str(step.where)),
            _cell(step.text, "mono line"),
            _cell(step.code, "mono line"),
            _cell(step.why, "soft"),
            _number(f"{count:,}"),
        ]
        for step, count in plain_rows(found)
    ]
    if not rows:
        return '<p class="foot">Nothing: every operation but views became a layer.</p>'
    columns = ["where", "line", "it runs", "why", "times>"]
    return f'<div class="wide">{_table(columns, rows)}</div>'


def _table(columns: Sequence[str], rows: Iterable[list[str] | str]) -> str:
    """Rows of cells; one that is a text heads a section."""
    head = "".join(
        f'<th class="n">{name[:-1]}</th>' if name.endswith(">") else f"<th>{name}</th>"
        for name in columns
    )
    body = "".join(
        f'<tr class="section"><td colspan="{len(columns)}">{row}</td></tr>'
        if isinstance(row, str)
        else f"<tr>{''.join(row)}</tr>"
        for row in rows
    )
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"


def _cell(content: str, css: str = "") -> str:
    return f'<td class="{css}">{escape(content)}</td>' if css else f"<td>{escape(content)}</td>"


def _mono(content: str) -> str:
    return _cell(content, "mono")


def _number(content: str) -> str:
    return _cell(content, "n")
