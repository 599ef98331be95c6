"""An explanation as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from compiler.explain.folding import numbers_text
from compiler.explain.padding import Cost, HeadPadding
from compiler.explain.records import BlockView, Parameter, Step
from compiler.explain.roofline import Estimate, Phase
from compiler.shown import bytes_text, quantity, seconds_text
from funcmodels.errors import listed

if TYPE_CHECKING:
    from compiler.explain.report import Explanation


def tables(found: Explanation) -> Iterator[Table | Text]:
    """The totals, the parameters of each block, what is left to torch, what is sent, and times."""
    yield _totals(found)
    cached = [step.work.cached for block in found.blocks for step in block.steps]
    for text in dict.fromkeys(filter(None, cached)):
        yield Text(f"Cached for each token and layer: {text}\n")
    if found.head_padding is not None:
        yield _head_padding(found.head_padding)
    for block in found.blocks:
        if block.parameters:
            yield _parameters(found, block)
    if found.unread:
        yield Text(f"Not read by forward, so not served: {listed(found.unread)}\n")
    if found.plain:
        yield _plain(found)
    if found.collectives:
        yield _collectives(found)
    if found.estimate is not None:
        yield _times(found.estimate)


def layout(found: Explanation) -> str:
    """`tp=8, pp=2: 16 ranks`."""
    sizes = [f"{n}={v}" for n, v in (("tp", found.tp), ("pp", found.pp), ("ep", found.ep)) if v > 1]
    ranks = found.tp * found.pp
    return f"{', '.join(sizes)}: {ranks} ranks" if sizes else "one rank"


def times(block: BlockView) -> str:
    """`×126`, or nothing where there is one."""
    return f" ×{block.count}" if block.count > 1 else ""


def title_of(block: BlockView) -> str:
    """`decoder_layer ×126 (my_model.py:20 in decoder_layer)`."""
    where = f" ({block.where})" if block.where else ""
    return f"{block.name}{times(block)}{where}"


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    """A table whose columns that end in `>` are of numbers."""
    table = Table(
        title=Text(title, style="bold"),
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in columns:
        right = name.endswith(">")
        table.add_column(name.rstrip(">"), justify="right" if right else "left", overflow="fold")
    return table


def _totals(found: Explanation) -> Table:
    table = _table(
        f"{found.model}: {found.num_parameters:,} parameters, {layout(found)}, {found.dtype}",
        "stage",
        "layers",
        "weights>",
        "KV/token>",
        *(["state/sequence>"] if found.state_per_sequence else []),
        "collectives/step",
        "of them/token>",
        "to the next>",
        caption="Of one rank. Below, bytes are of one parameter on one rank; "
        "Q: quantisable, L: LoRA target.",
    )
    for i, stage in enumerate(found.stages):
        counts = ", ".join(f"{n} {kind}" for kind, n in stage.collectives.items())
        table.add_row(
            str(i),
            _range(stage.layers),
            bytes_text(stage.weights),
            bytes_text(stage.kv_per_token),
            *([bytes_text(stage.state_per_sequence)] if found.state_per_sequence else []),
            counts or "none",
            bytes_text(stage.collective_bytes),
            bytes_text(stage.sends) if stage.sends else "",
        )
    return table


PADDING = ("stage", "ranks", "zeros", "weights>", "KV/token>", "products/token>", "attention/pair>")


def padding_title(found: HeadPadding) -> str:
    """`Heads of zeros: heads 9-11 of 12, kv_heads 3 of 4`."""
    told = [f"{a} {_range((before, n - 1))} of {n}" for a, (before, n) in found.sizes.items()]
    return f"Heads of zeros: {', '.join(told)}"


PADDING_NOTE = (
    "Of each rank: what is for zeros, of all; zeros cost as much as other heads. "
    "Unpadded: what a rank would have if ranks could share the model's own heads evenly."
)


def padding_rows(found: HeadPadding) -> list[list[str]]:
    """What zeros cost: of each stage its ranks, those alike together, and one without zeros."""
    rows = []
    for stage, unpadded in enumerate(found.unpadded):
        for at in (r for r in found.ranks if r.stage == stage):
            heads = ", ".join(f"{zeros} of {n} {axis}" for axis, (n, zeros) in at.heads.items())
            pairs = zip(_cost_texts(at.zeros), _cost_texts(at.all), strict=True)
            rows.append(
                [
                    str(stage),
                    numbers_text(at.ranks),
                    heads,
                    *(f"{part} of {all_}" for part, all_ in pairs),
                ]
            )
        rows.append([str(stage), "unpadded", "none", *_cost_texts(unpadded)])
    return rows


def _cost_texts(cost: Cost) -> list[str]:
    sizes = [bytes_text(cost.weights), bytes_text(cost.kv_per_token)]
    return [*sizes, quantity(cost.flops, "FLOP"), quantity(cost.attention_flops, "FLOP")]


def _head_padding(found: HeadPadding) -> Table:
    table = _table(padding_title(found), *PADDING, caption=PADDING_NOTE)
    for row in padding_rows(found):
        table.add_row(*map(Text, row))
    return table


def _range(numbers: tuple[int, ...]) -> str:
    return "-".join(map(str, dict.fromkeys((numbers[0], numbers[-1])))) if numbers else ""


def flags(parameter: Parameter) -> str:
    """`QL`: it can be quantised, and adapted."""
    return ("Q" if parameter.is_quantisable else "") + ("L" if parameter.is_lora_target else "")


def shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def remark(parameter: Parameter, tp: int) -> str:
    """What of a parameter's bytes is no share of it: padding, or the same on several ranks."""
    found = []
    if parameter.padding:
        found.append(f"{bytes_text(parameter.padding)} of padding")
    if 1 < parameter.replicas < tp:
        found.append(f"each part on {parameter.replicas} ranks")
    elif parameter.replicas == tp > 1:
        found.append("on every rank")
    return ", ".join(found)


def parameter_rows(block: BlockView) -> list[tuple[Parameter, str]]:
    """The parameters of a block, those alike once; a name says how often, if not as the block."""
    first: dict[Any, Parameter] = {}
    counts: Counter[Any] = Counter()
    for p in block.parameters:
        key = (p.path, p.module, p.part, p.layer, p.shape, p.local_shape)
        first.setdefault(key, p)
        counts[key] += p.count
    return [
        (p, p.path if counts[key] == block.count else f"{p.path} ×{counts[key]}")
        for key, p in first.items()
    ]


def _parameters(found: Explanation, block: BlockView) -> Table:
    table = _table(
        title_of(block),
        "parameter",
        "shape>",
        "on a rank>",
        "bytes>",
        "layer",
        "module",
        "",
        "",
    )
    for p, name in parameter_rows(block):
        part = f" [{p.part}]" if p.part else ""
        row = [name, shape_text(p.shape), shape_text(p.local_shape), bytes_text(p.bytes)]
        row += [p.layer, p.module + part, flags(p), remark(p, found.tp)]
        table.add_row(*map(Text, row))
    return table


def plain_rows(found: Explanation) -> list[tuple[Step, int]]:
    """What is left to torch, with how often it is there; what several blocks share, once."""
    return _counted(found.plain, lambda step: (step.where, step.code, step.why))


def collective_rows(found: Explanation) -> list[tuple[Step, int]]:
    """The collectives, with how often they are there; what several blocks share, once."""
    return _counted(found.collectives, lambda step: (step.where, step.collective))


def _counted(
    steps: Sequence[tuple[BlockView, Step]], key: Callable[[Step], Any]
) -> list[tuple[Step, int]]:
    first: dict[Any, Step] = {}
    counts: Counter[Any] = Counter()
    for block, step in steps:
        first.setdefault(key(step), step)
        counts[key(step)] += block.count
    return [(step, counts[k]) for k, step in first.items()]


def _plain(found: Explanation) -> Table:
    table = _table("Left to plain torch", "where", "code", "why", "times>")
    for step, count in plain_rows(found):
        table.add_row(*map(Text, [str(step.where), step.code, step.why, str(count)]))
    return table


def collective_bytes(step: Step) -> str:
    assert step.collective is not None
    per = "sampled token" if step.collective.is_per_sample else "token"
    return f"{bytes_text(step.collective.bytes)}/{per}"


def _collectives(found: Explanation) -> Table:
    table = _table("Collectives", "which", "where", "line", "why", "bytes>", "times>")
    for step, count in collective_rows(found):
        assert step.collective is not None
        row = [step.collective.kind, str(step.where), step.text, step.collective.why]
        row += [collective_bytes(step), str(count)]
        table.add_row(*map(Text, row))
    return table


def _times(found: Estimate) -> Table:
    d = found.device
    table = _table(
        f"{d.name}: {quantity(d.flops, 'FLOP/s')}, {quantity(d.bandwidth, 'B/s')} of memory, "
        f"{quantity(d.link, 'B/s')} of links",
        "at best",
        "time>",
        "tokens/s>",
        "compute>",
        "memory>",
        "links>",
        "bound by",
        caption=f"a roofline: real steps are slower. Room for {found.kv_tokens:,} tokens of KV "
        "cache, activations aside.",
    )
    many = "sequence" if found.batch == 1 else "sequences"
    table.add_row(*_phase(f"prefill of {found.prefill.tokens:,} tokens", found.prefill))
    what = f"decoding {found.batch:,} {many} at {found.decode.context:,} tokens"
    table.add_row(*_phase(what, found.decode))
    return table


def _phase(what: str, phase: Phase) -> list[str]:
    parts = (phase.seconds, phase.compute, phase.memory, phase.links)
    total, *each = map(seconds_text, parts)
    return [what, total, f"{phase.tokens_per_second:,.0f}", *each, phase.bound]
