"""Tables of tensors that are stacked, or that several layers have, do not grow with depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funcmodels as fm
from compiler.emit.loading import _parts_table
from compiler.emit.scope import Module
from compiler.emit.text import wrapped
from compiler.fold_names import fold_parts, spelled_parts
from compiler.needs import Exact
from compiler.vllm_target import source_for_vllm
from funcmodels import ops
from tests.compiler.programs import TABLE, small

N = tuple(range(12))


def of(form: str, values=N) -> tuple[str, ...]:
    return tuple(form.format(i) for i in values)


CASES = {
    "stacked": ({"layers.q": of("layers.{}.q")}, [("layers.q", (), {"layers.*.q": (N,)})]),
    "parts of each layer": (
        {f"layers.{i}.gate_up": of(f"layers.{i}.gate_up.{{}}", (0, 1)) for i in N},
        [("layers.*.gate_up", (N,), {"layers.{0}.gate_up.*": ((0, 1),)})],
    ),
    "copies": (
        {"embed": ("embed", *of("again{}_embed", N[1:]))},
        [("embed", (), {"embed": (), "again*_embed": (N[1:],)})],
    ),
    "copies of listed ones": (
        {f"list.{i}.up": (f"list.{i}.up", *of(f"again{{}}_list.{i}.up", (1, 2))) for i in (0, 1)},
        [("list.*.up", ((0, 1),), {"list.{0}.up": (), "again*_list.{0}.up": ((1, 2),)})],
    ),
    "some of the layers": (
        {f"layers.{i}.a": (f"layers.{i}.a", f"b.{i}.a") for i in (0, 3)},
        [("layers.*.a", ((0, 3),), {"layers.{0}.a": (), "b.{0}.a": ()})],
    ),
    "another order": ({"q": ("l.2.q", "l.0.q", "l.1.q")}, [("q", (), {"l.*.q": ((2, 0, 1),)})]),
    "numbers of their own": (
        {"layers.1.w1": ("layers.1.w1", "again1_layers.1.w1")},
        [("layers.1.w1", (), {"layers.1.w1": (), "again1_layers.1.w1": ()})],
    ),
    "long names": (
        {f"{'model.' * 9}{i}.q": of(f"{'model.' * 20}{i}.{{}}.q.weight", range(3)) for i in N},
        [(f"{'model.' * 9}*.q", (N,), {f"{'model.' * 20}{{0}}.*.q.weight": ((0, 1, 2),)})],
    ),
    "long names, several": (
        {"q": ("q", *of("model." * 11 + "{}.q", range(2)), *of("other." * 15 + "{}.q", range(2)))},
        [
            (
                "q",
                (),
                {
                    "q": (),
                    "model." * 11 + "*.q": ((0, 1),),
                    "other." * 15 + "*.q": ((0, 1),),
                },
            )
        ],
    ),
    "two numbers": ({"q": ("a.0.b.1", "a.1.b.0")}, [("q", (), {"a.0.b.1": (), "a.1.b.0": ()})]),
    "layers that differ": (
        {f"l.{i}.a": (f"l.{i}.a", f"{'bc'[i % 2]}.{i}") for i in range(4)},
        [
            ("l.*.a", ((0, 2),), {"l.{0}.a": (), "b.{0}": ()}),
            ("l.*.a", ((1, 3),), {"l.{0}.a": (), "c.{0}": ()}),
        ],
    ),
    "not all of two": (
        {"l.0.1.a": ("b.0.1", "c"), "l.1.0.a": ("b.1.0", "c")},
        [("l.0.1.a", (), {"b.0.1": (), "c": ()}), ("l.1.0.a", (), {"b.1.0": (), "c": ()})],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_emitted(case):
    """The text of a table is an expression that has the table's value."""
    table, _ = CASES[case]
    module = Module("", {"layers": len(N)}, Exact({}))
    scope: dict[str, Any] = {"LAYERS": len(N)}
    lines = _parts_table(module, "TABLE", table)
    exec("\n".join(new for line in lines for new in wrapped(line)), scope)
    assert scope["TABLE"] == {name: list(made) for name, made in table.items()}


@pytest.mark.parametrize("case", CASES)
def test_folded(case):
    table, want = CASES[case]
    assert fold_parts(table) == want
    assert spelled_parts(want) == {name: list(made) for name, made in table.items()}


@pytest.mark.parametrize(
    "made", [("a.0", "a.1", "b.0", "a.2", "a.3"), ("a.0", "b.0", "a.0.0"), ("a.00", "a.01")]
)
def test_the_order_stays(made):
    assert spelled_parts(fold_parts({"q": made})) == {"q": list(made)}


def test_numbers_written_otherwise():
    table = {"layers.00.a": ("layers.00.a", "b.00.a"), "layers.01.a": ("layers.01.a", "b.01.a")}
    assert spelled_parts(fold_parts(table)) == {name: list(made) for name, made in table.items()}


@fm.block
def layer(p, x):
    return x + torch.tanh(ops.rms_norm(x, p["norm"], eps=1e-5) @ p["up"].T) @ p["down"].T


def deep(n: int, kind: str) -> fm.Model:
    P = fm.axes(layers=n, hidden=16, mlp=12)
    lead = "layers " if kind == "stacked" else ""
    names = {"norm": "hidden", "up": "mlp hidden", "down": "hidden mlp"}

    def forward(params, tokens, positions, segment_ids=None):
        x, own = ops.embed(tokens, params["embed"]), params["own"]
        for i in range(n):
            x = layer({k: w[i] for k, w in own.items()} if kind == "stacked" else own, x)
        return ops.unembed(x, params["head"])

    return small(forward, {"own": {k: P(lead + v) for k, v in names.items()}}, TABLE)


@pytest.mark.parametrize("kind", ["stacked", "shared"])
def test_source_does_not_grow_with_depth(kind):
    shallow, deeper = (source_for_vllm(deep(n, kind)).count("\n") for n in (3, 9))
    assert shallow == deeper
