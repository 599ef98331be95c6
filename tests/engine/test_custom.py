"""Each feature of attention, norms and activations, served, equals the pure function."""

import pytest

from tests.engine.custom import custom
from tests.engine.tiny import check, expected, saved, serve_model

FEATURES = {
    "plain": {},
    "window": {"local_window": 24},
    "softcap": {"softcap": 2.0},
    "sinks": {"has_sinks": True},
    "alibi": {"positions": "alibi"},
    "learned-positions": {"positions": "learned"},
    "qk-norm": {"has_qk_norm": True},
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
