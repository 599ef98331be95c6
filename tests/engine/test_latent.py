"""Latent attention on the engine: its cache of latents, and keys and values where it has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funcmodels as fm
from tests.engine.harness import generate, make_llm, run_in_engine
from tests.engine.latent import SMALL, WIDE_VALUES, latent
from tests.engine.test_explain import modules_of, remember_sizes, told
from tests.engine.test_lora import OPTIONS, write_adapter
from tests.engine.tiny import (
    PROMPTS,
    check,
    distance,
    expected,
    register,
    saved,
    serve_model,
    weights_of,
)
from tests.models.zoo import rows

DISABLED = {"VLLM_MLA_DISABLE": "1"}
# Where a machine has a faster kernel, it is for bfloat16 alone.
BACKEND = {"attention_config": {"backend": "CPU_MLA"}}
SIZES = {"latent": {}, "small": SMALL, "wide-values": WIDE_VALUES}
CACHED = {"latent": 512 + 64, "small": 2 * 4 * 48, "wide-values": 2 * 4 * 64}
SCALE = 1.3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model of SIZES saved once: name -> (model, folder, what is expected of it)."""
    made = {}

    def folder_of(size):
        if size not in made:
            folder, model = tmp_path_factory.mktemp(size), latent(**SIZES[size])
            weights = saved(model, folder, scale=SCALE)
            made[size] = model, folder, expected(model, weights)
        return made[size]

    return folder_of


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_answers_and_what_is_allocated(size, tp, folders):
    """Equal to the pure function; a rank holds and caches what fm.explain says."""
    model, folder, want = folders(size)

    def run() -> Any:
        remember_sizes(register(model))
        llm = make_llm(folder, arch=model.name, tp=tp, **BACKEND)
        return generate(llm, PROMPTS, prompt_logprobs=True), llm.collective_rpc(told)

    served, ranks = run_in_engine(run)
    check(served, want)
    found = fm.explain(model, tp=tp, dtype=torch.float32)
    whole = size == "latent"  # on each rank, and not divided by heads
    layers = len(model.params["layers"])
    assert found.kv_per_token == layers * 4 * CACHED[size] // (1 if whole else tp)
    for rank in ranks:
        assert sum(rank["kv"].values()) == found.kv_per_token
        assert rank["parameters"] == modules_of(found)


@pytest.mark.parametrize("size", ["latent", "small"])
def test_traced_by_dynamo(size, folders):
    model, folder, want = folders(size)
    check(serve_model(model, folder, compiled="trace", **BACKEND), want)


def test_keys_and_values_in_pieces_and_from_the_cache(folders):
    """Without a cache of latents, prompts come in pieces, and prefixes from the cache."""
    model, folder, want = folders("small")
    served = serve_model(
        model,
        folder,
        warm_prompts=[[*PROMPTS[2][:-4], 5, 6, 7]],
        prompt_logprobs=False,
        enable_prefix_caching=True,
        block_size=32,
        max_num_seqs=4,
        max_num_batched_tokens=32,
    )
    assert [answer.num_cached_tokens for answer in served] == [0, 0, 64]
    check(served, want)


@pytest.mark.parametrize("tp", [1, 2])
def test_deepseek_without_a_cache_of_latents(tp, tmp_path, monkeypatch):
    """The same tokens, and as much memory as fm.explain says in the same environment."""
    model = rows()["deepseek_v3"].model()
    weights = saved(model, tmp_path)
    cached = fm.explain(model, tp=tp, dtype=torch.float32).kv_per_token
    assert cached == 2 * 4 * (512 + 64)

    def run() -> Any:
        register(model)
        llm = make_llm(tmp_path, arch=model.name, tp=tp)
        return generate(llm, PROMPTS, prompt_logprobs=True), llm.collective_rpc(kv_of)

    served, ranks = run_in_engine(run, env=DISABLED)
    check(served, expected(model, weights))
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    found = fm.explain(model, tp=tp, dtype=torch.float32)
    assert ranks == [found.kv_per_token] * tp
    assert found.kv_per_token == 2 * 4 * 2 * 4 * 96 // tp


def kv_of(worker: Any) -> float:
    """Bytes that a rank's layers cache of a token."""
    specs = worker.get_kv_cache_spec().values()
    return sum(spec.page_size_bytes / spec.block_size for spec in specs)


def test_latents_without_a_kernel_are_refused(tmp_path):
    """The engine itself would fail at the first token that it decodes."""
    model = rows()["deepseek_v3"].model(kv_lora_rank=64)
    saved(model, tmp_path)
    with pytest.raises(ValueError, match="= 128\n  need: one of 576\n  fix:  VLLM_MLA_DISABLE=1"):
        serve_model(model, tmp_path, **BACKEND)


def test_attention_to_keys_is_refused_where_latents_are_cached(tmp_path):
    """Its config.json says latents; what the engine allocates is not what the model writes."""
    model = latent(expands=True)
    weights = saved(model, tmp_path, scale=SCALE)
    with pytest.raises(ValueError, match="caches latents, but this model attends to keys"):
        serve_model(model, tmp_path, **BACKEND)
    check(serve_model(model, tmp_path, env=DISABLED), expected(model, weights))


@pytest.mark.parametrize("dims", [(64, 32), (32, 64)], ids=["narrow values", "wide values"])
def test_heads_whose_values_are_not_as_wide_as_keys(dims, tmp_path):
    """By ops.attention: the engine's kernel on a CPU takes one width, and does not ask."""
    qk, v = dims
    sizes = {"qk_nope_head_dim": qk - 16, "qk_rope_head_dim": 16, "v_head_dim": v}
    model = latent(expands=True, kv_lora_rank=64, **sizes)
    weights = saved(model, tmp_path, scale=SCALE)
    check(serve_model(model, tmp_path), expected(model, weights))


@pytest.mark.parametrize("size", ["latent", "small"])
def test_pushed_weights(size, folders):
    """The two halves of kv_b, which the engine keeps apart, are made anew."""
    model, folder, want = folders(size)
    new = weights_of(model, scale=1.6)

    def run() -> Any:
        register(model)
        llm = make_llm(folder, arch=model.name, **BACKEND)
        before = generate(llm, PROMPTS, prompt_logprobs=True)
        fm.push_weights(llm, new)
        return before, generate(llm, PROMPTS, prompt_logprobs=True)

    before, after = run_in_engine(run)
    check(before, want)
    check(after, expected(model, new))


def test_adapters_of_all_but_the_up_projection(folders, tmp_path):
    """While decoding, the engine multiplies with the matrix itself, and would leave out kv_b's."""
    model, folder, want = folders("latent")
    weights = fm.load(model, folder)
    merged = write_adapter(tmp_path / "rest", model, weights, r"\.(q_a|q_b|kv_a|o)$")
    write_adapter(tmp_path / "up", model, weights, r"\.kv_b$")

    def serve(*adapters: Any) -> Any:
        register(model)
        llm = make_llm(folder, arch=model.name, **OPTIONS, **BACKEND)
        return generate(llm, PROMPTS[: len(adapters)], adapters=adapters)

    served = run_in_engine(serve, None, tmp_path / "rest", tmp_path / "rest")
    check(served, [want[0], *expected(model, merged)[1:]])
    with pytest.raises(Exception, match=r"no layers\.0\.kv_b that an adapter could change"):
        run_in_engine(serve, tmp_path / "up")


FAULTS = {
    "rope": ("is_neox_style=False,", "is_neox_style=True,"),
    "scale": ("scale=96**-0.5", "scale=97**-0.5"),
    "shared key": ("k_rope.reshape((-1, 1, 64))", "1.01 * k_rope.reshape((-1, 1, 64))"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, folders):
    model, folder, want = folders("latent")
    served = serve_model(model, folder, edit=lambda s: s.replace(*FAULTS[fault]), **BACKEND)
    assert distance(served, want) > 1e-3
