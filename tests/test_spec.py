"""Declarations and what a Model derives from them."""

from __future__ import annotations

import functools

import torch

import funcmodels as fm


def forward(params, tokens, positions, segment_ids=None):
    return tokens


def model(**changes) -> fm.Model:
    P = fm.axes(vocab=8, hidden=4, heads=2, head_dim=3)
    params = {
        "embed": P("vocab hidden", hf="embed.weight"),
        "layers": [
            {"q": P("heads head_dim hidden", hf="h.{layers}.q: (heads head_dim) hidden")}
            for _ in range(3)
        ],
        "scale": P("", init="ones"),
    }
    return fm.Model("M", None, params, forward, **changes)


def test_param():
    P = fm.axes(heads=2, hidden=4)
    param = P("heads  hidden", dtype=torch.float32)
    assert (param.axes, param.shape, param.numel) == (("heads", "hidden"), (2, 4), 8)
    assert param.where.file == __file__
    assert param.where.function == "test_param"
    assert param == P("heads hidden", dtype=torch.float32)  # on another line


def test_scalar():
    param = fm.axes(a=2)("")
    assert (param.axes, param.shape, param.numel) == ((), (), 1)


def test_paths_and_names():
    m = model()
    assert list(m.by_path) == ["embed", "layers.0.q", "layers.1.q", "layers.2.q", "scale"]
    names = {path: map_.names for path, map_ in m.tensor_maps.items()}
    assert names["layers.2.q"] == ("h.2.q",)
    assert names["scale"] == ("scale",)  # without hf, its path
    assert m.tensor_maps["layers.0.q"].tensor_shape() == (6, 4)
    assert m.num_parameters == 8 * 4 + 3 * 24 + 1
    assert repr(m) == "Model(M, 105 parameters)"


def test_specs_follow_the_table_and_a_parameter_overrides_it():
    m = model(sharding={"heads": "tp", "vocab": None})
    assert m.specs["layers.1.q"] == fm.PartitionSpec("tp", None, None)
    assert m.specs["embed"] == fm.PartitionSpec(None, None)
    assert m.specs["scale"] == fm.PartitionSpec()
    P = fm.axes(heads=2, hidden=4)
    own = {
        "a": P("heads hidden", sharding=fm.PartitionSpec(None, "tp")),
        "b": P("heads hidden"),
    }
    m = fm.Model("M", None, own, forward, sharding={"heads": "tp"})
    assert m.specs == {"a": fm.PartitionSpec(None, "tp"), "b": fm.PartitionSpec("tp", None)}


def test_a_partial_is_a_forward():
    def with_config(params, tokens, positions, segment_ids=None, *, cfg):
        return cfg

    m = fm.Model("M", None, {}, functools.partial(with_config, cfg=3))
    assert m.forward({}, None, None) == 3


def test_params_may_be_dataclasses_and_tuples():
    @fm.tree.dataclass
    class Layer:
        q: object
        k: object

    P = fm.axes(a=2)
    params = {"layers": (Layer(P("a"), P("a")), Layer(P("a"), P("a")))}
    m = fm.Model("M", None, params, forward)
    assert list(m.by_path) == ["layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k"]
    weights = fm.init(m, seed=0)
    assert isinstance(weights["layers"][1], Layer)
    assert weights["layers"][1].k.shape == (2,)
