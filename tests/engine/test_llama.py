"""The emitted Llama on the real engine equals the pure function and vLLM's own class."""

import json
import re

import pytest
import torch

import funcmodels as fm
from tests.engine.harness import generate, make_llm, run_in_engine, serve
from tests.engine.tiny import (
    PROMPTS,
    check,
    distance,
    expected,
    register,
    saved,
    serve_model,
    tiny_llama,
)

HEADS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
}
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "wide-heads": {"head_dim": 64},
    "odd-vocabulary": {"vocab_size": 251},
    "all": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
}
SHORT, LONG = [1.0 + i / 40 for i in range(16)], [2.0 + i / 4 for i in range(16)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 64,
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn-attention-factor": YARN | {"attention_factor": 1.25},
    "yarn-mscale": YARN | {"mscale": 1.4, "mscale_all_dim": 0.7},
    "yarn-betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-untruncated": YARN | {"truncate": False},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The grouped-query Llama: model, folder, and what is expected of it."""
    folder = tmp_path_factory.mktemp("plain")
    model = tiny_llama()
    weights = saved(model, folder)
    return model, folder, expected(model, weights)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("heads", HEADS)
def test_heads(heads, tp, tmp_path):
    model = tiny_llama(**HEADS[heads])
    weights = saved(model, tmp_path)
    check(serve_model(model, tmp_path, tp=tp), expected(model, weights))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, tp, tmp_path):
    model = tiny_llama(**VARIANTS[variant])
    weights = saved(model, tmp_path)
    check(serve_model(model, tmp_path, tp=tp), expected(model, weights))


@pytest.mark.parametrize("rope", ROPES)
def test_rope_types(rope, tmp_path):
    model = tiny_llama(rope_scaling=ROPES[rope])
    weights = saved(model, tmp_path)
    check(serve_model(model, tmp_path), expected(model, weights))


@pytest.mark.parametrize("factor", [None, 1.2])
def test_longrope_within_its_original_length(factor, tmp_path):
    extra = {} if factor is None else {"attention_factor": factor}
    model = tiny_llama(rope_scaling=LONGROPE | extra)
    weights = saved(model, tmp_path)
    prompts = [p[:50] for p in PROMPTS]
    served = serve_model(model, tmp_path, prompts, max_model_len=64)
    check(served, expected(model, weights, prompts))


def test_longrope_above_its_original_length(tmp_path):
    """Long sequences are exact; short ones get the factors of long ones, and the class says so."""
    model = tiny_llama(rope_scaling=LONGROPE)
    weights = saved(model, tmp_path)
    short, long = (expected(model, weights, [prompt]) for prompt in PROMPTS[::2])

    def run():
        import logging

        register(model)
        records = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())
        logging.getLogger().addHandler(handler)
        answers = generate(make_llm(tmp_path), PROMPTS, prompt_logprobs=True)
        return answers, [r for r in records if "factors for long sequences" in r]

    served, warnings = run_in_engine(run)
    check(served[2:], long)
    assert distance(served[:1], short) > 0.01
    assert warnings
    assert "max_model_len=64 is exact" in warnings[0]


def test_dynamic_rope_above_its_length_is_refused(tmp_path):
    """Cached keys would keep the angles of a shorter sequence."""
    model = tiny_llama(
        rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=64
    )
    saved(model, tmp_path)
    with pytest.raises(ValueError, match="max_model_len=128\n  fix:  max_model_len=64"):
        serve_model(model, tmp_path, max_model_len=128)


@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
def test_longer_than_it_was_compiled_for(rope, tmp_path):
    """The engine's table of angles grows with max_model_len: past its end is other memory."""
    model = tiny_llama(rope_scaling=ROPES.get(rope), max_position_embeddings=64)
    weights = saved(model, tmp_path)
    lengthen(tmp_path, 256)
    check(serve_model(model, tmp_path), expected(model, weights))


@pytest.mark.parametrize("rope", ["yarn", "longrope"])
def test_longer_than_the_table_of_angles_is_refused(rope, tmp_path):
    scaling = YARN | {"factor": 2.0} if rope == "yarn" else LONGROPE
    saved(model := tiny_llama(rope_scaling=scaling, max_position_embeddings=128), tmp_path)
    lengthen(tmp_path, 256)
    with pytest.raises(ValueError, match="max_model_len=256\n  fix:  max_model_len=128"):
        serve_model(model, tmp_path)


def lengthen(folder, length):
    """Let config.json allow longer sequences."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": length}))


@pytest.mark.parametrize("tp", [1, 2])
def test_chunked_prefill(plain, tp):
    """Prompts in pieces of at most 16 tokens, mixed with decoding."""
    model, folder, want = plain
    check(serve_model(model, folder, tp=tp, max_num_seqs=4, max_num_batched_tokens=16), want)


@pytest.mark.parametrize("tp", [1, 2])
def test_prefix_caching(plain, tp):
    """The second request with a long prefix reads it from the cache."""
    model, folder, want = plain
    served = serve_model(
        model,
        folder,
        tp=tp,
        warm_prompts=[[*PROMPTS[2][:-4], 5, 6, 7]],
        prompt_logprobs=False,
        enable_prefix_caching=True,
        block_size=32,
    )
    assert [answer.num_cached_tokens for answer in served] == [0, 0, 64]
    check(served, want)


@pytest.mark.parametrize("tp", [1, 2])
def test_traced_by_dynamo(plain, tp):
    """The class compiles as one graph; what was traced runs eagerly."""
    model, folder, want = plain
    check(serve_model(model, folder, tp=tp, compiled="trace"), want)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_compiled_by_inductor(plain, tp):
    model, folder, want = plain
    check(serve_model(model, folder, tp=tp, compiled=True), want)


@pytest.mark.slow
def test_pipeline_stages(plain):
    model, folder, want = plain
    served = serve_model(
        model,
        folder,
        compiled=True,
        pipeline_parallel_size=2,
        distributed_executor_backend="mp",
        prompt_logprobs=False,
    )
    check(served, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_equals_vllms_own_class(dtype, tp, tmp_path):
    """Bit for bit, once the layers with quicker kernels are exchanged for vLLM's."""
    model = tiny_llama(attention_bias=True)
    saved(model, tmp_path, getattr(torch, dtype))

    def with_vllms_layers(source):
        return re.sub(r"= Fast(\w+)\(", r"= \1(", source)

    ours = serve_model(model, tmp_path, edit=with_vllms_layers, tp=tp, dtype=dtype)
    theirs = serve(
        tmp_path, PROMPTS, arch="LlamaForCausalLM", tp=tp, dtype=dtype, prompt_logprobs=True
    )
    assert ours == theirs


@pytest.mark.parametrize("tp", [1, 2])
def test_is_within_tolerance_of_vllms_own_class(tp, plain):
    model, folder, _ = plain
    theirs = serve(folder, PROMPTS, arch="LlamaForCausalLM", tp=tp, prompt_logprobs=True)
    ours = serve_model(model, folder, tp=tp)
    check(ours, [(s.tokens, torch.tensor(s.all_logprobs)) for s in theirs])


def test_bfloat16_is_within_noise(tmp_path):
    """As far from the float32 model as the pure function in bfloat16 is, within a factor of two."""
    model = tiny_llama()
    weights = saved(model, tmp_path, torch.bfloat16)
    tokens = [answer.tokens for answer in serve_model(model, tmp_path, dtype="bfloat16")]
    full = [[*p, *t] for p, t in zip(PROMPTS, tokens, strict=True)]
    exact = fm.logprobs(model, fm.tree.map(torch.Tensor.float, weights), full)
    pure = fm.logprobs(model, weights, full)
    served = serve_model(model, tmp_path, full, dtype="bfloat16", max_tokens=1)
    noise = [(p - e).abs().mean() for p, e in zip(pure, exact, strict=True)]
    ours = [
        (torch.tensor(s.prompt_logprobs) - e).abs().mean()
        for s, e in zip(served, exact, strict=True)
    ]
    assert sum(noise) < 0.2
    assert sum(ours) < 2 * sum(noise)


FAULTS = {
    "scale": ("scale=HEAD_DIM**-0.5", "scale=1.1 * HEAD_DIM**-0.5"),
    "rope": ('"rope_theta": 10000.0}', '"rope_theta": 9000.0}'),
    "rotation": ("max_position=", "is_neox_style=False, max_position="),
    "norm": ("eps=1e-05", "eps=1e-02"),
    "residual": ("return mlp, residual", "return mlp, residual + 1e-3 * mlp"),
    "window": (
        'quant_config=vllm_config.quant_config,\n            prefix=f"{prefix}.attn"',
        'per_layer_sliding_window=80,\n            prefix=f"{prefix}.attn"',
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, plain):
    """The comparison itself: small faults in the emitted source are far outside the tolerance."""
    model, folder, want = plain
    served = serve_model(model, folder, edit=lambda source: source.replace(*FAULTS[fault]))
    assert distance(served, want) > 1e-3
