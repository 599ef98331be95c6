"""Paths, mapping and flattening of parameter trees."""

from __future__ import annotations

import torch

import funcmodels as fm


@fm.tree.dataclass
class Pair:
    left: object
    right: object


TREE = {"b": [1, (2, 3)], "a": Pair(4, {"x": 5})}


def test_items_in_the_order_of_the_tree():
    assert list(fm.tree.items(TREE)) == [
        ("b.0", 1),
        ("b.1.0", 2),
        ("b.1.1", 3),
        ("a.left", 4),
        ("a.right.x", 5),
    ]
    assert fm.tree.leaves(TREE) == [1, 2, 3, 4, 5]


def test_map_keeps_the_structure():
    assert fm.tree.map(lambda x: -x, TREE) == {"b": [-1, (-2, -3)], "a": Pair(-4, {"x": -5})}
    doubled = fm.tree.map(lambda x, y: x + y, TREE, TREE)
    assert fm.tree.leaves(doubled) == [2, 4, 6, 8, 10]


def test_map_with_path():
    named = fm.tree.map_with_path(lambda path, x: f"{path}={x}", TREE)
    assert named["a"].right["x"] == "a.right.x=5"


def test_unflatten_is_the_inverse_of_items():
    assert fm.tree.unflatten(TREE, dict(fm.tree.items(TREE))) == TREE


def test_a_single_leaf_has_the_empty_path():
    assert list(fm.tree.items(7)) == [("", 7)]


def test_torch_func_takes_gradients_over_it():
    tree = fm.tree.map(lambda x: torch.tensor(float(x)), TREE)
    grads = torch.func.grad(lambda t: sum(x**2 for x in fm.tree.leaves(t)))(tree)
    assert isinstance(grads["a"], Pair)
    assert [float(g) for g in fm.tree.leaves(grads)] == [2, 4, 6, 8, 10]
