"""What fm.explain counts, against published sizes and closed forms; what it draws and writes."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import einsum
from hypothesis import given, settings

import funcmodels as fm
from compiler.explain import ExplainError
from compiler.explain.diagram import WIDTH, diagram
from compiler.explain.folding import Repeat, folded_steps, numbers_text
from compiler.explain.page import page
from compiler.stages import layers_of_stages
from compiler.vllm_target import source_for_vllm
from examples import hello
from funcmodels import ops
from funcmodels.errors import FuncModelsError, LoweringError, ShardingError
from funcmodels.models import llama
from tests.compiler.programs import TABLE, axes, small
from tests.compiler.random_programs import model_of, specs
from tests.engine.poolers import pooler
from tests.engine.test_value_residual import model as value_residual
from tests.tiny_llama import tiny

# Sizes of the checkpoints' config.json: layers, hidden, mlp, heads; and their published parameters.
LLAMA_3_1 = {
    "8B": (32, 4096, 14336, 32, 8_030_261_248),
    "70B": (80, 8192, 28672, 64, 70_553_706_496),
    "405B": (126, 16384, 53248, 128, 405_853_388_800),
}
KV_HEADS, HEAD_DIM = 8, 128


def llama_3_1(size: str) -> fm.Model:
    layers, hidden, mlp, heads, _ = LLAMA_3_1[size]
    hf = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    return llama.model(llama.Config.from_hf(hf))


# Published sizes


@pytest.mark.parametrize("size", list(LLAMA_3_1))
def test_one_rank_holds_the_published_parameters(size):
    found = fm.explain(llama_3_1(size))
    assert found.num_parameters == LLAMA_3_1[size][-1]
    assert found.weights == 2 * LLAMA_3_1[size][-1]
    assert found.kv_per_token == LLAMA_3_1[size][0] * 2 * KV_HEADS * HEAD_DIM * 2


@pytest.mark.parametrize(("size", "tp", "pp"), [("405B", 8, 2), ("70B", 4, 1), ("8B", 16, 3)])
def test_all_ranks_together_hold_them_and_copies_of_norms(size, tp, pp):
    layers, hidden, _, _, published = LLAMA_3_1[size]
    found = fm.explain(llama_3_1(size), tp=tp, pp=pp)
    assert sum(len(stage.layers) for stage in found.stages) == layers
    norms = (2 * layers + 1) * hidden
    kv_copies = max(1, tp // KV_HEADS) - 1  # of each key and value head
    kv = 2 * layers * KV_HEADS * HEAD_DIM * hidden
    want = published + (tp - 1) * norms + kv_copies * kv
    assert tp * sum(stage.weights for stage in found.stages) == 2 * want
    per_layer = 2 * max(1, KV_HEADS // tp) * HEAD_DIM * 2
    assert [s.kv_per_token for s in found.stages] == [
        len(s.layers) * per_layer for s in found.stages
    ]


def test_collectives_of_a_llama():
    found = fm.explain(llama_3_1("405B"), tp=8, pp=2)
    first, last = found.stages
    assert first.collectives == {"all_reduce": 2 * 63 + 1}  # the embedding's too
    assert last.collectives == {"all_reduce": 2 * 63, "all_gather": 1}
    assert first.collective_bytes == (2 * 63 + 1) * 16384 * 2
    assert first.sends == 2 * 16384 * 2  # the hidden states and the residual
    assert last.sends == 0
    lines = {(block.name, step.text.split(" ")[0]) for block, step in found.collectives}
    assert lines == {
        ("forward", "x"),
        ("attention", "out"),
        ("mlp", "down"),
        ("compute_logits", "return"),
    }
    reduce = next(s.collective for _, s in found.collectives)
    assert reduce.wire == 2 * 7 / 8 * reduce.bytes


def test_a_vocabulary_is_padded():
    P = fm.axes(vocab=1000, hidden=16)
    model = fm.Model(
        "Padded",
        None,
        {"embed": P("vocab hidden"), "head": P("vocab hidden")},
        lambda p, tokens, positions, segment_ids=None: ops.unembed(
            ops.embed(tokens, p["embed"]), p["head"]
        ),
        sharding={"vocab": "tp"},
    )
    found = fm.explain(model, tp=4)
    assert [p.local_shape for p in found.parameters] == [(256, 16), (256, 16)]
    assert [p.padding for p in found.parameters] == [6 * 16 * 2] * 2
    with pytest.raises(ShardingError) as error:
        fm.check(model, tp=3)
    assert "vocab=1000 (padded to 1024), tp=3" in error.value.lines["got"]
    assert found.weights == 2 * 256 * 16 * 2
    with pytest.raises(ShardingError, match="tp divides vocab"):
        fm.explain(model, tp=3)


def test_tied_weights_are_held_once_and_by_both_end_stages():
    whole = fm.explain(hello.model)
    assert whole.weights == 2 * hello.model.num_parameters
    first, last = fm.explain(hello.model, pp=2).stages
    table = 2 * 256 * 64
    norm = 2 * 64
    assert first.weights + last.weights == whole.weights + table
    assert last.weights - first.weights == norm


def test_declared_dtypes_count():
    P = axes()
    wide = {"wide": P("mlp hidden", dtype=torch.float32), "down": P("hidden mlp")}

    def forward(p, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, p["embed"])
        h = torch.relu(x.float() @ p["wide"].T).to(x.dtype)
        return ops.unembed(x + h @ p["down"].T, p["head"])

    found = {p.path: p for p in fm.explain(small(forward, wide, TABLE)).parameters}
    assert (found["wide"].dtype, found["wide"].bytes) == ("float32", 4 * 12 * 16)
    assert (found["down"].dtype, found["down"].bytes) == ("bfloat16", 2 * 12 * 16)


# What became of each


def test_layers_and_what_they_hold():
    found = {p.path: p for p in fm.explain(tiny(num_key_value_heads=2), tp=4).parameters}
    q, k = found["layers.*.attn.q"], found["layers.*.attn.k"]
    assert (q.layer, q.part, q.module) == (
        "QKVParallelLinear", "q", "model.layers.*.self_attn.qkv_proj.weight",
    )  # fmt: skip
    assert q.paths == ("layers.0.attn.q", "layers.1.attn.q")
    assert (q.local_shape[0], k.local_shape[0]) == (1, 1)
    assert (q.replicas, k.replicas) == (1, 2)  # two key-value heads on four ranks
    assert found["layers.*.mlp.down"].layer == "RowParallelLinear"
    flags = {path: (p.is_quantisable, p.is_lora_target) for path, p in found.items()}
    assert flags["layers.*.attn.q"] == (True, True)
    assert flags["norm"] == (False, False)
    assert flags["embed"] == (False, True)
    assert q.where.file.endswith("llama.py")


P = fm.axes(vocab=24, hidden=16, heads=4, head_dim=4, head_dim_out=4, mlp=12, rank=2)
ODD = {
    "q": P("heads head_dim hidden"),
    "mix": P("heads head_dim head_dim_out"),
    "o": P("hidden heads head_dim_out"),
    "up": P("mlp rank"),
    "low": P("rank hidden"),
    "down": P("hidden mlp"),
    "gate": P("hidden"),
    "embed": P("vocab hidden"),
    "head": P("vocab hidden"),
}


def odd_forward(p: Any, tokens: Any, positions: Any, segment_ids: Any = None) -> Any:
    x = ops.embed(tokens, p["embed"])
    q = einsum(x, p["q"], "t e, h d e -> t h d")
    mixed = einsum(q, p["mix"], "t h d, h d f -> t h f")  # one matrix a head
    x = x + einsum(mixed, p["o"], "t h f, e h f -> t e")
    w = p["up"] @ p["low"]  # of parameters alone
    h = torch.relu(x @ w.T)
    h = torch.sort(h, dim=-1)[0]  # over a cut dim, without a rule for that
    x = x * p["gate"] + h @ p["down"].T
    return ops.unembed(F.rms_norm(x, (16,)), p["head"])


ODD_MODEL = fm.Model(
    "Odd", None, ODD, odd_forward, sharding={"vocab": "tp", "heads": "tp", "mlp": "tp"}
)


def test_what_is_left_to_torch_names_line_and_reason():
    found = fm.explain(ODD_MODEL, tp=2)

    def why(start: str) -> list[str]:
        return [step.why for _, step in found.plain if step.text.startswith(start)]

    assert why("mixed =") == ["it applies another matrix to each element of a dim, as to each head"]
    assert why("w =") == ["both factors are parameters: nothing here depends on the tokens"]
    assert "computed from parameters" in why("h = torch.relu")[0]
    assert why("h = torch.sort") == [
        "it has no sharding rule for a cut dim, so every rank does all of it"
    ]
    assert set(why("x = x * p")) == {"vLLM has no layer for it"}
    (norm,) = {step.why for _, step in found.plain if "F.rms_norm" in step.text}
    assert norm == "vLLM's layer is for ops.rms_norm, with a weight and an eps"
    products = {step.text.split(" =")[0] for _, step in found.plain if step.is_product}
    assert products == {"mixed", "w", "h"}
    gather = next(s for _, s in found.collectives if s.kind == "collective")
    assert gather.text.startswith("h = torch.sort")
    assert gather.collective is not None
    assert gather.collective.kind == "all_gather"
    assert gather.collective.bytes == 12 * 2
    assert "no sharding rule" in gather.collective.why


HALVES = {
    "chunk": lambda h: h.chunk(2, -1),
    "split": lambda h: h.split(6, -1),
    "slices": lambda h: (h[..., :6], h[..., 6:]),
}


def gated(halves: Any, up: fm.Param) -> fm.Model:
    """A gated unit whose gate and up are made together."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        gate, up = halves(x, params["up"])
        return ops.unembed(x + (F.silu(gate) * up) @ params["down"].T, params["head"])

    P = fm.axes(hidden=16, mlp=12, half=6)
    return small(forward, {"up": up, "down": P("hidden half")}, {"mlp": "tp", "half": "tp"})


@pytest.mark.parametrize("how", HALVES)
def test_a_gather_of_parts_names_the_declaration_without_it(how):
    """Halves of what is cut lie on other ranks; of an axis of their own, each rank has its part."""
    P = fm.axes(hidden=16, mlp=12, two=2, half=6)
    model = gated(lambda x, up: HALVES[how](x @ up.T), P("mlp hidden"))
    whys = {s.collective.why for _, s in fm.explain(model, tp=2).collectives if s.collective}
    fix = 'declare the parts of "mlp" as an axis of their own, P("two mlp ...")'
    assert any(fix in why for why in whys), whys
    with pytest.raises(LoweringError) as error:
        source_for_vllm(model, strict=True)
    assert fix in error.value.lines["fix"]
    apart = gated(lambda x, up: (x @ w.T for w in up.unbind(0)), P("two half hidden"))
    assert "no sharding rule" not in str(fm.explain(apart, tp=2).collectives)


def test_arithmetic_of_plain_products():
    whole, half = (
        {s.name: s.work.flops for _, s in fm.explain(ODD_MODEL, tp=n).plain} for n in (1, 2)
    )
    assert whole["mixed"] == 2 * 4 * 4 * 4
    assert half["mixed"] == whole["mixed"] / 2
    matmul = next(name for name in whole if name.startswith("matmul"))
    assert whole[matmul] == 2 * 16 * 12


# Times


def test_the_roofline_of_a_llama():
    """Every term by hand, on a device of round numbers."""
    layers, hidden, mlp, heads, _ = LLAMA_3_1["8B"]
    tp = 2
    device = fm.Device("round", flops=1e12, bandwidth=1e11, link=1e10, memory=80e9, latency=1e-5)
    e = fm.explain(
        llama_3_1("8B"), tp=tp, device=device, prompt=512, batch=4, context=1024
    ).estimate
    assert e is not None
    kv_width = KV_HEADS * HEAD_DIM
    matrices = layers * (2 * hidden * hidden + 2 * kv_width * hidden + 3 * hidden * mlp) / tp
    head = 128256 * hidden / tp
    norms = (2 * layers + 1) * hidden
    heads_flops = layers * 2 * 2 * heads * HEAD_DIM / tp  # scores and values, a pair of tokens
    kv = layers * 2 * kv_width * 2 / tp
    embed_row = hidden * 2

    pairs = 512 * 513 // 2
    assert e.prefill.compute == pytest.approx(
        (2 * matrices * 512 + 2 * head + heads_flops * pairs) / 1e12
    )
    weights = 2 * (matrices + head + norms)
    assert e.prefill.memory == pytest.approx((weights + 512 * (2 * kv + embed_row)) / 1e11)
    reduces, gather = 2 * layers + 1, 128256 * 2 / 2
    assert e.prefill.links == pytest.approx(
        (reduces * 512 * hidden * 2 + gather) / 1e10 + (reduces + 1) * 1e-5
    )
    assert e.decode.compute == pytest.approx(
        (2 * (matrices + head) * 4 + heads_flops * 4 * 1024) / 1e12
    )
    assert e.decode.memory == pytest.approx((weights + 4 * (1025 * kv + embed_row)) / 1e11)
    assert e.prefill.bound == "compute"
    assert e.decode.bound == "memory"
    slower = max(e.decode.compute, e.decode.memory) + e.decode.links
    assert max(e.decode.memory, e.decode.links) < e.decode.seconds <= 1.01 * slower
    assert e.decode.tokens_per_second == pytest.approx(4 / e.decode.seconds)
    assert e.kv_tokens == int((80e9 - weights - 2 * head) / kv)


def test_a_window_bounds_what_attention_reads():
    def times(window: int | None) -> Any:
        def forward(p, tokens, positions, segment_ids=None):
            x = ops.embed(tokens, p["embed"])
            q = einsum(x, p["q"], "t e, h d e -> t h d")
            o = ops.attention(q, q, q, window=window, segment_ids=segment_ids)
            return ops.unembed(o.reshape(-1, 16), p["head"])

        model = small(forward, {"q": axes()("heads head_dim hidden")}, TABLE)
        device = fm.Device("one", flops=1.0, bandwidth=1.0, link=1.0, memory=1e9)
        return fm.explain(model, device=device, prompt=100, context=1000).estimate

    full, windowed = times(None), times(10)
    pair = 2 * 4 * (4 + 4)
    assert full.prefill.compute - windowed.prefill.compute == pair * (5050 - (55 + 90 * 10))
    assert full.decode.compute - windowed.decode.compute == pair * (1000 - 10)
    kv = 2 * 4 * 4 * 2
    assert full.decode.memory - windowed.decode.memory == kv * (1000 - 10)


def test_devices_by_name():
    assert fm.explain(hello.model, device="H100").estimate.device is fm.DEVICES["h100"]  # type: ignore[union-attr]
    with pytest.raises(ExplainError, match='no figures of a device "gpu"'):
        fm.explain(hello.model, device="gpu")
    with pytest.raises(ExplainError, match="16-bit"):
        fm.explain(hello.model, device="h100", dtype=torch.float32)


# Which sizes


def test_stages_as_vllm_cuts_them():
    assert [len(r) for r in layers_of_stages(10, 4)] == [2, 3, 3, 2]
    assert [len(r) for r in layers_of_stages(7, 2)] == [4, 3]
    assert [n for r in layers_of_stages(11, 3) for n in r] == list(range(11))


def test_the_grid_of_a_llama():
    grid = fm.check_grid(tiny(num_key_value_heads=2), tp=[1, 2, 3, 4, 8], pp=[1, 2, 3], ep=[1, 2])
    assert grid.valid == tuple((tp, pp, 1) for tp in (1, 2, 4) for pp in (1, 2))
    assert len(grid.layouts) == 30
    assert "heads" in str(grid.refused[3, 1, 1])
    assert "more pipeline stages than layers" in str(grid.refused[1, 3, 1])
    assert "has no experts" in str(grid.refused[1, 1, 2])
    told = str(grid)
    assert told.count("works") == 6
    assert told.count("no:") == 24


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, "tp is no number of ranks"),
        ({"ep": 4}, "no axis on mesh axis"),
        ({"pp": 4}, "more pipeline stages than layers"),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ShardingError, match=message):
        fm.explain(hello.model, **sizes)
    with pytest.raises(ShardingError, match=message):
        fm.check(hello.model, **sizes)


def test_a_model_without_a_loop_has_one_stage():
    with pytest.raises(ShardingError, match="cannot be cut into pipeline stages") as error:
        fm.explain(ODD_MODEL, pp=2)
    assert "layers" in str(error.value.lines["got"])


def test_stages_send_on_what_later_ones_read():
    """Of three layers, two on the first stage: a stream of 128, and 2 heads of 32 values."""
    found = fm.explain(value_residual, tp=2, pp=2)
    assert [len(stage.layers) for stage in found.stages] == [2, 1]
    assert [stage.sends for stage in found.stages] == [2 * (128 + 2 * 32), 0]
    grid = fm.check_grid(value_residual, tp=[1], pp=[1, 2, 3, 4])
    assert grid.valid == ((1, 1, 1), (1, 2, 1), (1, 3, 1))


def test_attention_that_is_not_cut_still_needs_ranks_that_divide_its_heads():
    """vLLM divides the heads of config.json before it looks at the model."""
    params = {"q": axes()("heads head_dim hidden")}

    def forward(p, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, p["embed"])
        q = einsum(x, p["q"], "t e, h d e -> t h d")
        o = ops.attention(q, q, q, segment_ids=segment_ids)
        return ops.unembed(o.reshape(-1, 16), p["head"])

    model = small(forward, params, {"vocab": "tp"})
    config = fm.Model(
        "Small", {"num_attention_heads": 4}, model.params, forward, sharding={"vocab": "tp"}
    )
    fm.check(config, tp=4)
    with pytest.raises(ShardingError, match="do not divide the query heads"):
        fm.check(config, tp=8)


# What is written


def test_as_text_and_json():
    found = fm.explain(hello.model, tp=2, pp=2, device="h100")
    told = str(found)
    for part in (
        "layers.*.q",
        "QKVParallelLinear",
        "all_reduce",
        "hello.py:31",
        "H100",
        "tp=2, pp=2: 4 ranks",
    ):
        assert part in told
    data = json.loads(found.to_json())
    assert data["weights"] == found.weights
    assert data["estimate"]["decode"]["bound"] == found.estimate.decode.bound  # type: ignore[union-attr]
    steps = {s["name"]: s for b in data["blocks"] for s in b["steps"]}
    assert steps["out"]["where"]["line"] == 31
    paths = {path for b in data["blocks"] for p in b["parameters"] for path in p["paths"]}
    assert paths == set(hello.model.by_path)


def test_every_parameter_is_told_once():
    found = fm.explain(llama_3_1("8B"), tp=2)
    paths = [path for p in found.parameters for path in p.paths]
    assert sorted(paths) == sorted(llama_3_1("8B").by_path)
    assert sum(prod(p.shape) * p.count for p in found.parameters) == LLAMA_3_1["8B"][-1]


def test_a_parameter_that_is_not_read_is_not_served():
    P = axes()

    def forward(p, tokens, positions, segment_ids=None):
        return ops.unembed(ops.embed(tokens, p["embed"]), p["head"])

    found = fm.explain(small(forward, {"spare": P("mlp hidden")}, {"vocab": "tp"}))
    assert found.unread == ("spare",)
    assert found.weights == 2 * 2 * 64 * 16  # two tables, padded
    assert "not served: spare" in str(found)
    assert "not served: spare" in page(found)


def test_models_that_pool():
    """They end where the pooler begins; what attends both ways keeps no keys."""
    causal = fm.explain(pooler("P1", task="embed", pooling="last", causal="all"), tp=2)
    both = fm.explain(pooler("P2", task="classify", pooling="mean", causal="none"), tp=2)
    assert causal.kv_per_token == 2 * 2 * 1 * 32 * 2
    assert both.kv_per_token == 0
    assert "pooled" in diagram(both)
    assert "logits" not in diagram(both).replace("pill logits", "")
    assert not any(step.collective.is_per_sample for _, step in both.collectives if step.collective)


def alternating(kinds: list[int | None]) -> fm.Model:
    """A model of which each layer has a window of its own."""
    P = fm.axes(vocab=64, hidden=128, heads=4, head_dim=32)
    layer = {"q": P("heads head_dim hidden"), "o": P("hidden heads head_dim")}

    @fm.block
    def attention(p, x, segment_ids, window):
        q = einsum(x, p["q"], "t e, h d e -> t h d")
        o = ops.attention(q, q, q, segment_ids=segment_ids, window=window)
        return x + einsum(o, p["o"], "t h d, e h d -> t e")

    def forward(p, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, p["embed"])
        for window, layer in zip(kinds, p["layers"], strict=True):
            x = attention(layer, x, segment_ids, window)
        return ops.unembed(x, p["embed"])

    params = {"embed": P("vocab hidden"), "layers": [layer] * len(kinds)}
    return fm.Model("Kinds", None, params, forward, sharding={"vocab": "tp", "heads": "tp"})


@pytest.mark.parametrize(
    ("kinds", "numbers"),
    [
        ([None] * 5, ["0–4"]),
        ([8, None] * 3, ["0, 2, … 4", "1, 3, … 5"]),
        ([8, 8, None] * 2, ["0, 1, 3, 4", "2, 5"]),
        ([8, None, None, 8, None], ["0, 3", "1, 2, 4"]),
    ],
)
def test_layers_are_folded(kinds, numbers):
    found = fm.explain(alternating(kinds), tp=2)
    [repeat] = [item for item in folded_steps(found.blocks[0]) if isinstance(item, Repeat)]
    assert list(map(numbers_text, repeat.numbers)) == numbers
    assert sum(map(len, repeat.numbers)) == len(kinds) == len(repeat.names)


def test_the_page_stands_alone():
    found = fm.explain(llama_3_1("405B"), tp=8, pp=2, device="h100")
    text = page(found)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nothing is loaded from
    assert not re.search(r"(src|href)=|@import|url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text
    assert len(text) < 100_000
    told = json.loads(re.search(r'id="details">(.*?)</script>', text)[1])  # type: ignore[index]
    drawn = set(re.findall(r'data-step="([^"]+)"', text))
    assert drawn == set(told)
    assert "einsum(o, p[&quot;o&quot;]" in "".join(told.values())


@pytest.mark.parametrize(
    "model", [hello.model, ODD_MODEL, llama_3_1("405B"), alternating([8, None, None, 8, None])]
)
def test_the_diagram_is_whole(model):
    """Well-formed, each step once, every box within the picture and none on another's text."""
    found = fm.explain(model, tp=2)
    root = ET.fromstring(diagram(found))
    height = float(root.attrib["height"])
    shapes = [e for e in root.iter() if e.tag.endswith("rect")]
    for e in shapes:
        x, y, w, h = (float(e.attrib[k]) for k in ("x", "y", "width", "height"))
        assert min(x, y, WIDTH - x - w, height - y - h) >= 0, e.attrib
    steps = [e.attrib["data-step"] for e in root.iter() if "data-step" in e.attrib]
    assert len(set(steps)) == len(steps)
    want = {
        f"{b.name}/{s.name}"
        for b in found.blocks
        for s in b.steps
        if s.kind in ("layer", "plain", "collective")
    }
    assert set(steps) == want
    bars = [e for e in shapes if e.attrib["class"] == "collective"]
    assert len(bars) == len(found.collectives)
    boxes = sorted(
        (float(e.attrib["y"]), float(e.attrib["height"]))
        for e in shapes
        if e.attrib["class"].startswith(("box", "collective"))
    )
    for (y, h), (after, _) in pairwise(boxes):
        assert y + h <= after, "two boxes overlap"


def test_long_names_fit():
    P = fm.axes(vocab=64, hidden=64)
    name = "the_projection_of_everything_" * 6
    params = {"embed": P("vocab hidden"), name: fm.axes(hidden=64, out=64)("out hidden")}

    def forward(p, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, p["embed"])
        return ops.unembed(x + torch.relu(x @ p[name].T), p["embed"])

    found = fm.explain(fm.Model("N" * 90, None, params, forward, sharding={"vocab": "tp"}), tp=2)
    root = ET.fromstring(diagram(found))
    texts = [e.text or "" for e in root.iter() if e.tag.endswith("text")]
    assert any("…" in text for text in texts)
    assert max(map(len, texts)) < 80
    assert name in page(found)  # in full in the tables


def served_on_two(model: fm.Model) -> bool:
    """Whether a model is compiled, and its axes allow two ranks."""
    try:
        source_for_vllm(model)
        fm.check(model, tp=2)
    except FuncModelsError:
        return False
    return True


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(specs())
def test_random_models(spec):
    """Whatever is served is explained: each parameter that is read is held, each box has room."""
    model = model_of(spec)
    try:
        found = fm.explain(model, tp=2)
    except FuncModelsError:
        assert not served_on_two(model)
        return
    root = ET.fromstring(diagram(found))
    assert all(float(e.attrib["width"]) > 0 for e in root.iter() if e.tag.endswith("rect"))
    assert found.weights == sum(p.bytes * p.count for p in found.parameters)
    assert all(1 <= p.replicas <= 2 and p.bytes > 0 for p in found.parameters)
    assert found.model in page(found)
