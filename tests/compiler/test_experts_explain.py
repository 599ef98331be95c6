"""`fm.check_grid` and `fm.explain` of mixtures of experts: sizes of ranks, memory, what is sent."""

from __future__ import annotations

import time
from functools import cache

import pytest

import funcmodels as fm
from funcmodels.errors import ShardingError
from tests.compiler.test_experts import MATRICES, SHARED, mixed, model_of, shared
from tests.models.zoo import rows

SIZE = "Qwen3-235B-A22B"
TOTAL = rows()["qwen3_moe"].published[SIZE].parameters
LAYERS, EXPERTS, CHOSEN = 94, 128, 8
EACH = 3 * 4096 * 1536  # of one expert in one layer
REST = TOTAL - LAYERS * EXPERTS * EACH


@cache
def big() -> fm.Model:
    row = rows()["qwen3_moe"]
    return row.zoo.model(row.zoo.Config.from_hf(row.published[SIZE].config))


@pytest.mark.parametrize(("tp", "ep"), [(4, 1), (1, 8), (4, 16)])
def test_memory_of_a_rank_agrees_with_the_published_parameters(tp, ep):
    """Experts by ep, or else by tp, and the rest by tp, but for what every rank has."""
    found = fm.explain(big(), tp=tp, ep=ep)
    experts = LAYERS * EXPERTS * EACH // max(tp, ep)
    whole = LAYERS * (EXPERTS * 4096 + 2 * 4096 + 2 * 128) + 4096  # routers and norms
    want = experts + (REST - whole) // tp + whole
    assert found.stages[0].weights == 2 * want


def test_products_of_a_token_agree_with_the_published_active_parameters():
    """22B, of which the embedding is a row of a table and no product."""
    found = fm.explain(big())
    flops = sum(s.work.flops * b.stages[0] for b in found.blocks for s in b.steps)
    active = REST + LAYERS * CHOSEN * EACH
    assert 21.5e9 < active < 22.5e9
    norms = LAYERS * (2 * 4096 + 2 * 128) + 4096
    assert flops == 2 * (active - 151936 * 4096 - norms)


def test_a_step_reads_the_experts_that_its_tokens_choose():
    def bytes_of(batch):
        found = fm.explain(big(), tp=8, device="h100", batch=batch, context=1).estimate
        return found.decode.memory * 3.35e12

    experts = 2 * LAYERS * EXPERTS * EACH / 8
    one, many = bytes_of(1), bytes_of(512)
    assert one < experts * CHOSEN / EXPERTS + 2 * REST
    assert many > experts
    assert many < 1.1 * (experts + 2 * REST / 8)


def test_what_ranks_send():
    def collectives(**ranks):
        found = fm.explain(rows()["qwen3_moe"].model(), **ranks)
        return {s.collective.kind: s.collective.bytes for _, s in found.collectives
                if s.title == "FusedMoEFactory"}  # fmt: skip

    assert collectives(tp=1) == {}
    assert collectives(tp=4) == collectives(tp=4, ep=4) == {"all_reduce": 2 * 128}
    there_and_back = 2 * 2 * 2 * 128  # of two experts a token
    assert collectives(tp=1, ep=8) == {"all_to_all": there_and_back}
    assert collectives(tp=2, ep=8) == {"all_to_all": there_and_back}


def test_the_grid_says_what_works_and_why_not_the_rest():
    fm.check_grid(model_of(mixed, MATRICES))  # what is made once is made
    begin = time.process_time()
    grid = fm.check_grid(big(), tp=(1, 4, 8), pp=(1, 2), ep=(1, 4, 8, 12, 256))
    assert time.process_time() - begin < 2  # 0.6 s alone on a machine
    each = {1: (1, 4, 8, 12), 4: (1, 4, 8, 12), 8: (1, 8)}
    works = {(tp, pp, ep) for tp in each for pp in (1, 2) for ep in each[tp]}
    assert set(grid.valid) == works
    assert "more ranks than experts" in str(grid.refused[8, 1, 256])
    error = str(grid.refused[8, 1, 4])
    assert "need: ep is a multiple of tp" in error
    assert "fix:  ep=8" in error
    row = next(line for line in str(grid).splitlines() if line.split()[:3] == ["4", "2", "8"])
    assert row.split()[3:5] == ["16", "works"]


def test_what_the_emitted_class_would_refuse_is_refused():
    model = model_of(shared, MATRICES | SHARED)
    fm.check(model, tp=2, ep=2)
    with pytest.raises(ShardingError, match=r"with another layer(.|\n)*fix: +ep=2"):
        fm.check(model, tp=2, ep=4)
    plain = model_of(mixed, MATRICES, {"vocab": "tp", "width": "tp"})
    with pytest.raises(ShardingError, match=r'need: +sharding=\{..., "experts": "ep"\}'):
        fm.check(plain, ep=2)


def test_experts_that_do_not_divide_leave_the_first_ranks_more():
    """As vLLM places them: six over four ranks are two, two, one and one."""
    found = fm.explain(model_of(mixed, MATRICES), ep=4)
    [gate] = [p for p in found.parameters if p.path == "gate"]
    assert gate.local_shape == (2, 12, 16)
    assert gate.is_quantisable
    assert not gate.is_lora_target
