"""What fm.explain counts is what the engine allocates, caches, sends, adapts and quantises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funcmodels as fm
from compiler.explain import Explanation
from compiler.stages import layers_of_stages
from tests.engine import mixtures, unusual
from tests.engine.custom import custom
from tests.engine.harness import generate, make_llm, run_in_engine
from tests.engine.tiny import register, saved, tiny_llama

# A vocabulary that is padded, key-value heads that are copied at tp=4, tied or with plain torch.
MODELS = {
    "llama": lambda: tiny_llama(vocab_size=200, attention_bias=True),
    "tied": lambda: tiny_llama(tie_word_embeddings=True, num_key_value_heads=1),
    "custom": lambda: custom(
        local_window=64, has_qk_norm=True, has_gains=True, activation="geglu", final_softcap=30.0
    ),
}


def remember_sizes(cls: Any) -> None:
    """Let a class note what it allocates: on a CPU, linears are emptied after loading."""
    made = cls.__init__

    def init(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        made(self, vllm_config=vllm_config, prefix=prefix)
        self.allocated = {n: p.numel() * p.element_size() for n, p in self.named_parameters()}

    cls.__init__ = init


def told(worker: Any) -> dict[str, Any]:
    """Of one rank: its parameters, its KV cache, and how often a step calls each collective."""
    from vllm.model_executor.layers import linear, vocab_parallel_embedding
    from vllm.model_executor.layers.fused_moe.runner import moe_runner

    model = worker.model_runner.model
    counts: dict[str, int] = {}

    def counted(name: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return call(*args, **kwargs)

        return run

    places = [linear, vocab_parallel_embedding, moe_runner]
    places.append(__import__("sys").modules[type(model).__module__])
    name = "tensor_model_parallel_all_reduce"
    for place in places:
        if hasattr(place, name):
            setattr(place, name, counted("all_reduce", getattr(place, name)))
    worker.counts = counts
    return {
        "parameters": model.allocated,
        "kv": {n: s.page_size_bytes / s.block_size for n, s in worker.get_kv_cache_spec().items()},
    }


def counts_of(worker: Any) -> dict[str, int]:
    return dict(worker.counts)


def modules_of(found: Explanation) -> dict[str, int]:
    """Bytes of each module's parameter on a rank, those of a layer one by one."""
    sizes: dict[str, int] = {}
    for p in found.parameters:
        for name in p.modules:
            sizes[name] = sizes.get(name, 0) + p.bytes
    return sizes


@pytest.mark.parametrize(
    ("kind", "tp", "pp"),
    [
        *((kind, tp, 1) for kind in MODELS for tp in (1, 2)),
        *(("tied", 1, 2), ("custom", 2, 2), ("stacked", 2, 1), ("shared", 2, 1)),
        *((f"experts: {mix}", tp, 1) for mix, tp in (("grouped, shared", 2), ("gelu, one", 1))),
        ("experts: in turns, biased", 2, 1),
    ],
)
def test_what_a_rank_holds_caches_and_sends(kind, tp, pp, tmp_path):
    _, mixes, mixture = kind.partition("experts: ")
    given = mixtures.model(mixture) if mixes else unusual.MODELS.get(kind)
    model = MODELS[kind]() if kind in MODELS else given
    saved(model, tmp_path, dtype=torch.bfloat16)
    found = fm.explain(model, tp=tp, pp=pp)
    sizes = {"tp": tp, "pipeline_parallel_size": pp} if pp > 1 else {"tp": tp}
    if pp > 1:
        sizes["distributed_executor_backend"] = "mp"

    def serve() -> Any:
        remember_sizes(register(model))
        options = {"arch": model.name, "dtype": "bfloat16", "load_format": "dummy"}
        llm = make_llm(tmp_path, **sizes, **options)
        ranks = llm.collective_rpc(told)
        generate(llm, [[1, 2, 3]], max_tokens=1)
        return ranks, llm.collective_rpc(counts_of)

    ranks, counts = run_in_engine(serve)
    assert len(ranks) == tp * pp
    for i, (rank, counted) in enumerate(zip(ranks, counts, strict=True)):
        stage = found.stages[i // tp]
        assert sum(rank["parameters"].values()) == stage.weights
        assert sum(rank["kv"].values()) == stage.kv_per_token
        if pp == 1:
            assert rank["parameters"] == modules_of(found)
        if tp > 1:  # the prompt is one step; alone, a rank's sums are calls that do nothing
            assert counted["all_reduce"] == stage.collectives["all_reduce"]
        else:
            assert stage.collectives == {}


def test_stages_are_those_of_the_engine():
    from vllm.distributed.utils import get_pp_indices

    for layers in range(1, 24):
        for pp in range(1, layers + 1):
            want = [get_pp_indices(layers, stage, pp) for stage in range(pp)]
            assert [(r.start, r.stop) for r in layers_of_stages(layers, pp)] == want


def modules(found: Explanation, flag: str) -> set[str]:
    """The modules of parameters with a flag."""
    names = set()
    for p in found.parameters:
        for path in p.paths if getattr(p, flag) else ():
            indices = iter(part for part in path.split(".") if part.isdigit())
            parts = p.module.removesuffix(".weight").split(".")
            names.add(".".join(next(indices) if part == "*" else part for part in parts))
    return names


@pytest.mark.parametrize("kind", ["llama", "custom"])
def test_what_can_be_adapted_and_quantised(kind, tmp_path):
    model = MODELS[kind]()
    saved(model, tmp_path, dtype=torch.bfloat16)
    found = fm.explain(model)

    def adapted(worker: Any) -> set[str]:
        from vllm.lora.layers import BaseLayerWithLoRA, LogitsProcessorWithLoRA

        named = dict(worker.model_runner.model.named_modules())
        return {
            "lm_head" if isinstance(m, LogitsProcessorWithLoRA) else name
            for name, m in named.items()
            if isinstance(m, BaseLayerWithLoRA)
        }

    def quantised(worker: Any) -> set[str]:
        named = worker.model_runner.model.named_modules()
        methods = {n: type(getattr(m, "quant_method", None)).__name__ for n, m in named}
        return {n for n, m in methods.items() if m != "NoneType" and "Unquantized" not in m}

    def serve() -> Any:
        register(model)
        options = {"arch": model.name, "dtype": "bfloat16", "load_format": "dummy"}
        llm = make_llm(tmp_path, enable_lora=True, max_lora_rank=8, **options)
        [with_adapters] = llm.collective_rpc(adapted)
        llm = make_llm(tmp_path, quantization="fp8_per_channel", **options)
        [with_fp8] = llm.collective_rpc(quantised)
        return with_adapters, with_fp8

    with_adapters, with_fp8 = run_in_engine(serve)
    assert with_adapters == modules(found, "is_lora_target")
    assert {n for n in with_fp8 if not n.endswith("attn")} == modules(found, "is_quantisable")
