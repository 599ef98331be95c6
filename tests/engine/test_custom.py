"""Each feature of attention, norms and activations, served, equals the pure function."""

import pytest

from tests.engine.custom import custom
from tests.engine.tiny import PROMPTS, check, distance, expected, saved, serve_model

FEATURES = {
    "plain": {},
    "window": {"local_window": 24},
    "softcap": {"softcap": 2.0},
    "sinks": {"has_sinks": True},
    "alibi": {"positions": "alibi"},
    "learned-positions": {"positions": "learned"},
    "qk-norm": {"has_qk_norm": True},
    "qk-norm-of-all-heads": {"norms_all_heads": True},
    "qk-norm-of-a-replicated-head": {"norms_all_heads": True, "num_key_value_heads": 1},
    "bare-parameters": {"has_gains": True},
    "partial-rotary": {"rotary_dim": 16},
    "interleaved-rotary": {"interleaved": True},
    "scale": {"attention_scale": 0.4},
    "final-softcap": {"final_softcap": 3.0},
    "gemma-norm": {"norm_offset": 1.0},
    "geglu": {"activation": "geglu"},
    "geglu-tanh": {"activation": "geglu-tanh"},
    "gelu": {"activation": "gelu"},
    "window-softcap-qk-norm": {"local_window": 24, "softcap": 2.0, "has_qk_norm": True},
    "window-sinks-gains": {"local_window": 24, "has_sinks": True, "has_gains": True},
}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("feature", FEATURES)
def test_equals_the_pure_function(feature, tp, tmp_path):
    model = custom(**FEATURES[feature])
    weights = saved(model, tmp_path)
    check(serve_model(model, tmp_path, tp=tp), expected(model, weights))


# Features that one model can have at once, for what engines do beside plain prefill and decoding.
MANY = {
    "local_window": 24,
    "softcap": 2.0,
    "has_sinks": True,
    "has_qk_norm": True,
    "has_gains": True,
    "rotary_dim": 16,
    "final_softcap": 5.0,
    "activation": "geglu",
}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    model = custom(**MANY)
    weights = saved(model, folder)
    return model, folder, expected(model, weights)


@pytest.mark.parametrize("tp", [1, 2])
def test_many_features_traced(many, tp):
    model, folder, want = many
    check(serve_model(model, folder, tp=tp, compiled="trace"), want)


@pytest.mark.slow
def test_many_features_compiled(many):
    model, folder, want = many
    check(serve_model(model, folder, compiled=True), want)


def test_many_features_in_chunks(many):
    """Pieces smaller than the window and the blocks of the cache."""
    model, folder, want = many
    check(serve_model(model, folder, max_num_seqs=4, max_num_batched_tokens=16), want)


def test_many_features_from_the_prefix_cache(many):
    model, folder, want = many
    served = serve_model(
        model,
        folder,
        warm_prompts=[[*PROMPTS[2][:-4], 5, 6, 7]],
        prompt_logprobs=False,
        enable_prefix_caching=True,
        block_size=32,
    )
    assert served[2].num_cached_tokens == 64
    check(served, want)


FAULTS = {
    "window": ("per_layer_sliding_window=24", "per_layer_sliding_window=25"),
    "softcap": ("logits_soft_cap=2.0", "logits_soft_cap=2.1"),
    "sinks": ("sinks=self.sinks", "sinks=self.sinks + 0.1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, many):
    model, folder, want = many
    served = serve_model(model, folder, edit=lambda source: source.replace(*FAULTS[fault]))
    assert distance(served, want) > 1e-3
