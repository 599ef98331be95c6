"""Parameters that share a tensor of the checkpoint: how the served file speaks of them."""

from typing import Any

import pytest
from einops import einsum

import funcmodels as fm
from compiler.pad import pad_heads
from compiler.shared_tensors import numbered, set_apart, stem
from compiler.vllm_target import source_for_vllm
from funcmodels import ops

IN_TURNS = {"q": "heads[0:2/4]", "k": "kv_heads[2:3/4]", "v": "kv_heads[3:4/4]"}
IN_PIECES = {"q": "heads[0:4/8]", "k": "kv_heads[4:6/8]", "v": "kv_heads[6:8/8]"}
# Keys and values alone share a tensor.
PARTLY = {"q": None, "k": "kv_heads[0:2/4]", "v": "kv_heads[2:4/4]"}


@fm.block
def attend(p, x, segment_ids):
    q = einsum(x, p["q"], "... e, h d e -> ... h d")
    k = einsum(x, p["k"], "... e, h d e -> ... h d")
    v = einsum(x, p["v"], "... e, h d e -> ... h d")
    o = ops.attention(q, k, v, segment_ids=segment_ids)
    return einsum(o, p["o"], "... h d, e h d -> ... e")


def forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["embed"])
    for p in params["layers"]:
        x = x + attend(p, x, segment_ids)
    return ops.unembed(x, params["embed"])


def model(rows, at="layers.{layers}.attn"):
    P = fm.axes(vocab=64, hidden=16, heads=4, kv_heads=2, head_dim=32)

    def layer():
        own = {"o": P("hidden heads head_dim", hf=f"{at}.o.weight: hidden (heads head_dim)")}
        for name, row in rows.items():
            axis = "heads" if name == "q" else "kv_heads"
            hf = f"{at}.fused.weight: ({row} head_dim) hidden"
            if row is None:
                hf = f"{at}.{name}.weight: ({axis} head_dim) hidden"
            own[name] = P(f"{axis} head_dim hidden", hf=hf)
        return own

    params = {"embed": P("vocab hidden", hf="embed.weight"), "layers": [layer(), layer()]}
    table = {"vocab": "tp", "heads": "tp", "kv_heads": "tp"}
    config = {"max_position_embeddings": 64}
    return fm.Model("SharedTensors", config, params, forward, table)


def tables(source):
    """What the file says of names: SHARED and LORA_TARGETS, and the fused modules."""
    lines = source[source.index("LORA_TARGETS") : source.index("class ")]
    namespace: dict[str, Any] = {"LAYERS": 2}
    exec("import re\n" + lines, namespace)
    start = source.index("packed_modules_mapping")
    exec(source[start : source.index("}", start) + 1], namespace)
    return namespace


@pytest.mark.parametrize("rows", [IN_TURNS, IN_PIECES], ids=["turns", "pieces"])
def test_one_layer_under_the_name_of_the_checkpoint(rows):
    source = source_for_vllm(model(rows), strict=True)
    found = tables(source)
    assert "self.fused = QKVParallelLinear(" in source
    assert found["packed_modules_mapping"] == {"fused": ["fused"]}
    [(pattern, (dim, turns, unit, is_one, parts))] = found["SHARED"].items()
    assert (
        pattern.fullmatch("layers.1.attn.fused.weight").expand([*parts][1])
        == "layers.1.attn.fused#1.weight"
    )
    assert (dim, turns, unit) == ((0, 2, 32) if rows is IN_TURNS else (0, 1, 32))
    assert [*parts.values()] == ([2, 1, 1] if rows is IN_TURNS else [4, 2, 2])
    assert is_one


def test_adapters_may_change_what_is_in_one_piece():
    """In turns, the rows of an adapter's factors would lie otherwise than the layer's."""
    assert "layers.*.attn.fused" in tables(source_for_vllm(model(IN_PIECES)))["LORA_TARGETS"]
    targets = tables(source_for_vllm(model(IN_TURNS)))["LORA_TARGETS"]
    assert set(targets) == {"layers.*.attn.o", "lm_head", "embed"}


def test_a_layer_of_a_part_alone_is_no_target():
    """The layer of q, k and v holds a tensor of another name, and half of one."""
    source = source_for_vllm(model(PARTLY))
    assert set(tables(source)["LORA_TARGETS"]) == {
        "layers.*.attn.o",
        "layers.*.attn.q",
        "lm_head",
        "embed",
    }
    assert "self.qkv = QKVParallelLinear(" in source


def test_a_layer_under_another_name_is_no_target():
    """An adapter's name would find no layer, and the engine would serve without it."""
    source = source_for_vllm(model(IN_PIECES, at="h.{layers}"))
    assert "self.qkv = QKVParallelLinear(" in source
    assert set(tables(source)["LORA_TARGETS"]) == {"h.*.o", "lm_head", "embed"}


def test_a_parameter_of_its_own_for_each_part():
    original = model(IN_TURNS)
    params, shared = set_apart(original)
    assert (
        params["layers.1.v"].hf == "layers.{layers}.attn.fused#2.weight: (kv_heads head_dim) hidden"
    )
    assert params["layers.1.o"] is original.by_path["layers.1.o"]
    assert shared["layers.1.attn.fused.weight"].parts == tuple(
        (f"layers.1.attn.fused#{i}.weight", n) for i, n in enumerate((2, 1, 1))
    )
    assert stem(numbered("layers.1.attn.fused", 2)) == "layers.1.attn.fused"


def test_padded_heads_have_tensors_of_their_own():
    """The numbers of rows in a layout are those of the heads that there were."""
    padded = pad_heads(model(IN_PIECES), tp=8).model
    assert padded.tensor_maps["layers.0.q"].names == ("layers.0.q",)
    assert padded.tensor_maps["layers.0.o"].names == ("layers.0.attn.o.weight",)
    assert padded.by_path["layers.0.q"].shape == (8, 32, 16)
