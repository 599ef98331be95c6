"""What every benchmark reports: rows of ours against a peer, as a table and as JSON.

A ratio above 1 is better for us, whichever direction the unit points.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measurement. `peer` is the best of all peers; `others` names what else was measured."""

    what: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    unit: str
    others: Mapping[str, float] = field(default_factory=dict)


def compare(
    what: str, ours: Sequence[float], peers: Mapping[str, Sequence[float]], unit: str
) -> Row:
    """The row of `ours` against the best of `peers`, from the figures of each turn: more is better.

    The ratio is the median of each turn's own: what slows the machine for a while slows both.
    """
    medians = {peer: median(values) for peer, values in peers.items()}
    name = max(medians, key=lambda peer: medians[peer])
    ratio = median(a / b for a, b in zip(ours, peers[name], strict=True))
    others = {other: value for other, value in medians.items() if other != name}
    return Row(what, median(ours), medians[name], name, ratio, unit, others)


def spread(values: Iterable[float]) -> float:
    """Half the distance from the lower to the upper quartile, relative to the median: the noise."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / median(ordered)


def report(title: str, rows: list[Row], json_file: Path | None = None) -> None:
    """Print the rows as a table, and write them to `json_file` where one is given."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    for name in ("ours", "best peer"):
        table.add_column(name, justify="right")
    table.add_column("which")
    table.add_column("ratio", justify="right")
    table.add_column("unit")
    table.add_column("also measured")
    for row in rows:
        others = ", ".join(f"{name} {number(value)}" for name, value in row.others.items())
        color = "green" if row.ratio >= 1 else "red"
        ratio = f"[{color}]{row.ratio:.2f}[/]"
        table.add_row(
            row.what, number(row.ours), number(row.peer), row.peer_name, ratio, row.unit, others
        )
    console = Console()
    if not console.is_terminal:  # in a file, rows are to be whole
        console = Console(width=140)
    console.print(table)
    if json_file is not None:
        write(rows, json_file)


def write(rows: list[Row], file: Path) -> None:
    """The rows as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def number(value: float) -> str:
    """Three significant digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
