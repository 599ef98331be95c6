"""Axis tables, partition specs and local shapes."""

from __future__ import annotations

import pytest

import funcmodels as fm
from funcmodels import sharding


def test_the_first_rule_for_an_axis_wins():
    rules = [("heads", "tp"), ("heads", None), ("mlp", None)]
    assert sharding.table_of(rules) == {"heads": "tp", "mlp": None}
    assert sharding.table_of({"heads": "ep"}) == {"heads": "ep"}


def test_partition_spec_is_a_tuple_that_prints_as_written():
    spec = fm.PartitionSpec("tp", None)
    assert spec == ("tp", None)
    assert repr(spec) == "PartitionSpec('tp', None)"


@pytest.mark.parametrize(
    ("size", "parts", "local"), [(8, 1, 8), (8, 4, 2), (2, 4, 1), (1, 3, 1), (3, 3, 1)]
)
def test_local_size(size, parts, local):
    assert sharding.local_size(size, parts) == local


def test_local_shape():
    spec = fm.PartitionSpec("tp", None, "ep")
    assert sharding.local_shape((8, 5, 6), spec, {"tp": 4, "ep": 2}) == (2, 5, 3)
    assert sharding.local_shape((8, 5, 6), spec, {"tp": 4}) == (2, 5, 6)
    assert sharding.local_shape((), fm.PartitionSpec(), {"tp": 4}) == ()


def test_two_mesh_axes_on_two_dims_are_fine():
    P = fm.axes(experts=4, mlp=6, hidden=3)
    param = P("experts mlp hidden")
    assert sharding.partition_spec(param, {"experts": "ep", "mlp": "tp"}) == ("ep", "tp", None)
