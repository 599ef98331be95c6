"""Latent attention in the compiler: what is refused, and what explain says of DeepSeek-V3."""

from __future__ import annotations

import functools
import io
import time

import pytest
import torch
from einops import einsum
from rich.console import Console

import funcmodels as fm
from compiler.vllm_target import source_for_vllm
from funcmodels import ops
from funcmodels.errors import LoweringError, ShardingError
from tests.engine.latent import Config, latent, params
from tests.models.zoo import rows

RANKS = (1, 2, 4, 8, 16, 32, 64)
LAYERS, MIXED, HIDDEN, EXPERTS = 61, 58, 7168, 256  # of DeepSeek-V3
EXPERT = 3 * 2048 * HIDDEN


@functools.cache
def deepseek() -> fm.Model:
    row = rows()["deepseek_v3"]
    published = row.published["DeepSeek-V3"]
    model = row.zoo.model(row.zoo.Config.from_hf(published.config))
    assert model.num_parameters == published.parameters == 671_026_419_200
    fm.check_grid(row.model())  # imports what a first trace needs
    return model


def test_a_token_uses_37_billion_parameters():
    experts = MIXED * EXPERTS * EXPERT
    assert round((deepseek().num_parameters - experts * (1 - 8 / EXPERTS)) / 1e9, 1) == 37.6


def test_the_grid_of_deepseek_v3():
    model = deepseek()
    grid = fm.check_grid(model, tp=(*RANKS, 3), pp=(1, 2, 4, 8, 16, 62))
    assert set(grid.valid) == {(tp, pp, 1) for tp in RANKS for pp in (1, 2, 4, 8, 16)}
    assert str(grid.refused[3, 1, 1].lines["got"]).startswith("num_attention_heads=128")
    assert "more pipeline stages than layers" in str(grid.refused[1, 62, 1])


def test_explain_of_deepseek_v3_on_64_ranks(monkeypatch, tmp_path):
    """Bytes of a rank follow from the published count; the latents are whole on each."""
    model = deepseek()
    begun = time.process_time()
    found = fm.explain(model, tp=64)
    assert time.process_time() - begun < 10
    assert found.weights == bytes_of_a_rank(64, 1)
    assert found.kv_per_token == LAYERS * 2 * (512 + 64)
    assert "a latent of 512 and a rope key of 64, whole on each rank" in printed(found)
    assert "a rope key of 64" in found.to_html(tmp_path / "page.html").read_text()
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    found = fm.explain(model, tp=64)
    assert found.kv_per_token == LAYERS * 2 * (128 // 64) * (192 + 192)
    assert "keys and values of each head, 192 wide" in printed(found)


def bytes_of_a_rank(tp: int, ep: int) -> int:
    """From the published count, in bfloat16: what each rank has whole, and its share of the rest.

    Each expert is whole on one rank with expert parallelism, and cut over all without.
    """
    down = LAYERS * (1536 + 512 + 64) * HIDDEN
    norms = LAYERS * (1536 + 512 + 2 * HIDDEN) + HIDDEN
    experts, biases = MIXED * EXPERTS * EXPERT, MIXED * EXPERTS  # these in float32
    whole = down + norms + MIXED * EXPERTS * HIDDEN
    divided = deepseek().num_parameters - experts - biases - whole
    return 2 * (divided // tp + whole + experts // max(tp, ep)) + 4 * biases


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "ep"), [(8, 1), (8, 8), (16, 16), (1, 8), (1, 32), (4, 32)])
def test_memory_of_a_rank_with_expert_parallelism(tp, ep):
    """As it is run: within a host, over two, and experts over more ranks than attention."""
    assert fm.explain(deepseek(), tp=tp, ep=ep).weights == bytes_of_a_rank(tp, ep)


def printed(found) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(found)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("changes", "cached"),
    [
        ({}, 512 + 64),
        ({"kv_lora_rank": 64}, 2 * 4 * 96),  # of which no engine has a kernel
        ({"expands": True}, 2 * 4 * 96),  # keys 96 wide, and values of 32 that are padded
    ],
    ids=["latent", "other-size", "keys-and-values"],
)
def test_what_is_cached_of_a_model_of_ones_own(changes, cached):
    assert fm.explain(latent(**changes)).kv_per_token == 2 * 2 * cached


def test_adapters_cannot_change_the_up_projection():
    targets = {p.name: p.is_lora_target for p in fm.explain(latent()).parameters}
    assert targets["q_b"]
    assert not targets["kv_b"]


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_every_step_of_the_lowering_agrees(name):
    row = rows()[name]
    model = row.model()
    weights = fm.tree.map(torch.Tensor.double, row.weights(model))
    for tp in (1, 2):
        fm.verify(model, weights, [[3, 1, 4, 1, 5, 9, 2, 6]], tp=tp)


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(ShardingError, match='cannot split axis "heads"'):
        fm.check(latent(), tp=3)


CFG = Config()


def with_up(up, use_twice=False):
    """A model of one layer whose up-projection is what `up` makes of a parameter."""

    def forward(params, tokens, positions, segment_ids=None):
        x, p = ops.embed(tokens, params["embed"]), params["layers"][0]
        q = einsum(x, p["q_a"], "... e, r e -> ... r")
        q = einsum(q, p["q_b"], "... r, h d r -> ... h d")
        kv = einsum(x, p["kv_a"], "... e, r e -> ... r")
        (q_nope, q_rope), (z, k) = q.split([32, 64], -1), kv.split([512, 64], -1)
        o = ops.latent_attention(q_nope, q_rope, z, k.unsqueeze(-2), up(p["kv_b"]))
        if use_twice:
            o = o * p["kv_b"].mean()
        return ops.unembed(einsum(o, p["o"], "... h d, e h d -> ... e"), params["embed"])

    tree = params(CFG)
    table = {"vocab": "tp", "heads": "tp"}
    return fm.Model("Up", config=CFG, params=tree, forward=forward, sharding=table)


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (with_up(lambda w: w * 2.0), "a value that is computed"),
        (with_up(lambda w: w, use_twice=True), "one that is used elsewhere"),
    ],
    ids=["computed", "twice"],
)
def test_an_up_projection_that_is_no_layer_is_refused(model, got):
    with pytest.raises(LoweringError, match=got) as error:
        fm.compile_to_vllm(model)
    assert "test_latent_attention.py" in str(error.value)
    assert "ops.attention" in str(error.value)


def test_a_block_is_not_named_as_a_layer_of_the_file():
    """`attention` of a model named Latent, beside the layer LatentAttention."""
    source = source_for_vllm(latent())
    assert source.count("class LatentAttention(nn.Module)") == 1
    assert "class LatentAttentionBlock(nn.Module)" in source
