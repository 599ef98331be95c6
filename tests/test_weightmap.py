"""The weight map is a bijection: random axes, orders, groupings and spread axes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcmodels as fm
from funcmodels.parts import stored_tensors_of
from funcmodels.weightmap import tensor_map

AXES = ("a", "b", "c", "d")


@st.composite
def maps(draw):
    """A weight map and the shape of its parameter."""
    axes = tuple(draw(st.permutations(AXES)))[: draw(st.integers(0, 4))]
    shape = tuple(draw(st.integers(1, 4)) for _ in axes)
    spread = tuple(axis for axis in axes if draw(st.booleans()))
    left = draw(st.permutations([axis for axis in axes if axis not in spread]))
    name = ".".join(["w", *(f"{{{axis}}}" for axis in draw(st.permutations(spread)))])
    return tensor_map(f"{name}: {grouped(draw, left)}", "w", axes, shape, "here"), shape


def grouped(draw, axes) -> str:
    """An einops pattern of the axes, some neighbours in one pair of parentheses."""
    groups: list[list[str]] = []
    for axis in axes:
        if groups and draw(st.booleans()):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups)


@settings(max_examples=200, deadline=None)
@given(maps())
def test_round_trip(drawn):
    map_, shape = drawn
    value = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    tensors = map_.from_param(value)
    assert len({*map_.names}) == len(map_.names) == len(tensors)
    assert all(tuple(t.shape) == map_.tensor_shape() for t in tensors)
    assert torch.equal(map_.to_param(tensors), value)


@settings(max_examples=200, deadline=None)
@given(maps(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_filling_in_any_order_gives_the_parameter(drawn, dtype):
    map_, shape = drawn
    value = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    tensors = map_.from_param(value)
    out = torch.full(shape, -1.0, dtype=dtype)
    for index in reversed(range(len(tensors))):
        map_.fill(out, index, tensors[index])
    assert torch.equal(out, value.to(dtype))


def test_names_follow_row_major_order_of_the_axes():
    map_ = tensor_map("w.{b}.{a}: c", "w", ("a", "c", "b"), (2, 3, 2), "here")
    assert map_.names == ("w.0.0", "w.1.0", "w.0.1", "w.1.1")
    value = torch.arange(12.0).reshape(2, 3, 2)
    for name, tensor in zip(map_.names, map_.from_param(value), strict=True):
        b, a = map(int, name.split(".")[1:])
        assert torch.equal(tensor, value[a, :, b])


@pytest.mark.parametrize(
    ("hf", "path", "name"),
    [
        ("model.layers.{layers}.w", "layers.3.attn.w", "model.layers.3.w"),
        ("h.{layers}.e.{experts}.w", "layers.3.experts.11.w", "h.3.e.11.w"),
        (None, "layers.3.attn.w", "layers.3.attn.w"),
    ],
)
def test_braces_take_the_index_of_the_enclosing_list(hf, path, name):
    map_ = tensor_map(hf, path, ("a",), (2,), "here")
    assert map_.names == (name,)
    assert map_.is_identity


def test_torch_linear_layout():
    map_ = tensor_map("w: (h d) e", "w", ("h", "d", "e"), (2, 3, 4), "here")
    value = torch.randn(2, 3, 4)
    assert torch.equal(map_.from_param(value)[0], value.reshape(6, 4))
    assert not map_.is_identity


def test_a_dim_of_one_element():
    map_ = tensor_map("conv.weight: channels 1 width", "w", ("channels", "width"), (3, 4), "here")
    value = torch.randn(3, 4)
    [stored] = map_.from_param(value)
    assert torch.equal(stored, value[:, None])
    assert map_.tensor_shape() == stored.shape
    assert torch.equal(map_.to_param([stored]), value)
    filled = torch.empty_like(value)
    map_.fill(filled, 0, stored)
    assert torch.equal(filled, value)


def test_a_part_of_dims_of_one_element():
    maps = [
        tensor_map(f"conv.weight: c[{at}:{at + n}/5] 1 width", "w", ("c", "width"), (n, 4), "here")
        for at, n in ((0, 2), (2, 3))
    ]
    whole = torch.randn(5, 1, 4)
    assert [m.tensor_shape() for m in maps] == [(5, 1, 4)] * 2
    assert torch.equal(torch.cat([m.to_param([whole]) for m in maps]), whole[:, 0])


def qkv(q: str, k: str) -> fm.Model:
    """A model of two parameters that share a tensor, with these layouts."""
    P = fm.axes(heads=6, kv_heads=2, head_dim=3, hidden=4)
    params = {
        "q": P("heads head_dim hidden", hf=f"qk.weight: {q}"),
        "k": P("kv_heads head_dim hidden", hf=f"qk.weight: {k}"),
    }
    return fm.Model("Shared", config={}, params=params, forward=lambda p, t, s, ids=None: t)


SHARED = {
    "rows": ("(heads[0:6/8] head_dim) hidden", "(kv_heads[6:8/8] head_dim) hidden"),
    "turns": ("(heads[1:4/4] head_dim) hidden", "(kv_heads[0:1/4] head_dim) hidden"),
    "counted in rows": ("(heads head_dim)[0:18/24] hidden", "(kv_heads head_dim)[18:24/24] hidden"),
    "columns": ("hidden (heads[0:6/8] head_dim)", "hidden (kv_heads[6:8/8] head_dim)"),
}


@pytest.mark.parametrize("layout", SHARED)
def test_parameters_that_share_a_tensor(layout):
    """Saved as one tensor, in the rows that the layouts say, and loaded bit for bit."""
    model = qkv(*SHARED[layout])
    weights = fm.init(model, seed=0)
    [(name, whole)] = stored_tensors_of(model.tensor_maps, weights)
    q, k = (weights[n].reshape(-1, 3, 4) for n in "qk")
    want = torch.cat([q, k])
    if layout == "turns":
        want = torch.cat([k[:1], q[:3], k[1:], q[3:]])
    want = want.reshape(24, 4)
    assert name == "qk.weight"
    assert torch.equal(whole, want.T if layout == "columns" else want)
    for path, map_ in model.tensor_maps.items():
        assert map_.tensor_shape() == whole.shape
        assert torch.equal(map_.to_param([whole]), weights[path])
        value = torch.empty_like(weights[path])
        map_.fill(value, 0, whole)
        assert torch.equal(value, weights[path])


@pytest.mark.parametrize(
    ("q", "k"),
    [
        ("(heads[0:6/8] head_dim) hidden", "(kv_heads[5:7/8] head_dim) hidden"),  # overlap
        ("(heads[0:6/9] head_dim) hidden", "(kv_heads[6:8/9] head_dim) hidden"),  # a row is left
        ("(heads[0:6/8] head_dim) hidden", "hidden (kv_heads[6:8/8] head_dim)"),  # other dims
        ("(heads[0:6/8] head_dim) hidden", "(kv_heads head_dim) hidden"),  # all of it
    ],
)
def test_parts_that_are_not_the_whole_are_refused(q, k):
    with pytest.raises(fm.errors.DeclarationError, match="stored in"):
        qkv(q, k)


def test_no_part_of_a_tensor():
    with pytest.raises(fm.errors.DeclarationError, match="takes no part of a tensor"):
        qkv("(heads[0:4/8] head_dim) hidden", "(kv_heads[6:8/8] head_dim) hidden")
    with pytest.raises(fm.errors.DeclarationError, match=r"got: .*\(heads head_dim\)=18\n"):
        qkv("(heads head_dim)[0:16/22] hidden", "(kv_heads head_dim)[16:22/22] hidden")
