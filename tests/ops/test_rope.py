"""`ops.rope` and `ops.rope_frequencies`, against transformers' modules and closed forms."""

import math

import pytest
import torch
from torch.func import jvp, vmap
from transformers import GPTJConfig, LlamaConfig
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from funcmodels import ops
from funcmodels.errors import ConfigError, ShapeError

HEADS, KV_HEADS, DIM, LONGEST, THETA = 4, 2, 16, 64, 1000.0
SHORT = [1.0 + 0.1 * i for i in range(DIM // 2)]
LONG = [2.0 + i for i in range(DIM // 2)]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
SCALINGS = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "legacy key": {"type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, every key": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn, attention_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.7,
        "original_max_position_embeddings": 16,
    },
    "longrope": {**LONGROPE, "original_max_position_embeddings": 32},
    "longrope, factor": {**LONGROPE, "factor": 6.0, "original_max_position_embeddings": 32},
    "longrope, attention_factor": {
        **LONGROPE,
        "attention_factor": 1.2,
        "original_max_position_embeddings": 32,
    },
}
LENGTHS = [16, 32, 33, LONGEST, LONGEST + 1, 200]


def transformers_rope(q, k, positions, scaling, theta=THETA):
    """Llama's own module and function, which read a config."""
    config = LlamaConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        max_position_embeddings=LONGEST,
        rope_parameters={**(scaling or {"rope_type": "default"}), "rope_theta": theta},
    )
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(q, positions)
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)


def inputs(seq, dtype=torch.float32, dim=DIM, batch=2):
    q, k = (torch.randn(batch, seq, h, dim, dtype=dtype) for h in (HEADS, KV_HEADS))
    return q, k, torch.arange(seq).repeat(batch, 1)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SCALINGS)
def test_every_scaling_equals_transformers(name, length):
    q, k, positions = inputs(length)
    scaling = SCALINGS[name]
    got = ops.rope(q, k, positions, theta=THETA, scaling=scaling, max_position=LONGEST)
    want = transformers_rope(q, k, positions, scaling)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["none", "llama3", "yarn", "longrope"])
def test_bfloat16_is_bitwise_that_of_transformers(name):
    q, k, positions = inputs(300, torch.bfloat16)
    scaling = SCALINGS[name]
    got = ops.rope(q, k, positions, theta=THETA, scaling=scaling, max_position=LONGEST)
    for a, b in zip(got, transformers_rope(q, k, positions, scaling), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


def test_original_length_comes_from_max_position_where_left_out():
    q, k, positions = inputs(LONGEST)
    got = ops.rope(q, k, positions, theta=THETA, scaling=LLAMA3, max_position=LONGEST)
    torch.testing.assert_close(got, transformers_rope(q, k, positions, LLAMA3))


@pytest.mark.parametrize("length", [32, 33])
def test_longrope_switches_where_phi3_does(length):
    from transformers import Phi3Config

    scaling = SCALINGS["longrope"]
    config = Phi3Config(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        max_position_embeddings=LONGEST,
        original_max_position_embeddings=32,
        rope_parameters={**scaling, "rope_theta": THETA},
    )
    q, k, positions = inputs(length)
    cos, sin = Phi3RotaryEmbedding(config)(q, positions)
    want = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    got = ops.rope(q, k, positions, theta=THETA, scaling=scaling, max_position=LONGEST)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rotary_dim", [DIM, 6])
def test_interleaved_layout_equals_gptj(rotary_dim):
    q, k, positions = inputs(40)
    config = GPTJConfig(n_embd=HEADS * DIM, n_head=HEADS, rotary_dim=rotary_dim, n_positions=64)
    table = modeling_gptj.create_sinusoidal_positions(64, rotary_dim)
    sin, cos = table[positions].chunk(2, dim=-1)
    got = ops.rope(q, k, positions, theta=10000.0, rotary_dim=config.rotary_dim, interleaved=True)
    for x, y in zip((q, k), got, strict=True):
        turned = modeling_gptj.apply_rotary_pos_emb(x[..., :rotary_dim], sin, cos)
        want = torch.cat((turned, x[..., rotary_dim:]), dim=-1)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("how", ["rotary_dim", "partial_rotary_factor"])
def test_partial_rotation_is_that_of_a_smaller_head(how, interleaved):
    q, k, positions = inputs(10, dim=32)
    said = (
        {"rotary_dim": DIM}
        if how == "rotary_dim"
        else {"scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}
    )
    got = ops.rope(q, k, positions, theta=THETA, interleaved=interleaved, **said)
    want = ops.rope(q[..., :DIM], k[..., :DIM], positions, theta=THETA, interleaved=interleaved)
    for x, y, z in zip((q, k), got, want, strict=True):
        torch.testing.assert_close(y, torch.cat((z, x[..., DIM:]), dim=-1))


def test_a_quarter_turn():
    # theta of one pair does not matter: inv_freq is 1, and position p turns by p radians.
    x = torch.tensor([1.0, 0.0]).reshape(1, 1, 2)
    q, _ = ops.rope(x, x, torch.tensor([2]), theta=10.0)
    torch.testing.assert_close(q.flatten(), torch.tensor([math.cos(2), math.sin(2)]))


def test_scores_depend_on_distance_only():
    q, k, positions = inputs(12, torch.float64, batch=1)
    q = q[:, :, :KV_HEADS]
    scores = [
        torch.einsum("bihd,bjhd->bhij", *ops.rope(q, k, positions + shift, theta=THETA))
        for shift in (0, 7)
    ]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


def test_flat_tokens_and_transforms():
    q, k, positions = inputs(10)
    kwargs = {"theta": THETA, "scaling": SCALINGS["dynamic"], "max_position": 4}
    whole = ops.rope(q, k, positions, **kwargs)
    for i in range(2):
        torch.testing.assert_close(
            ops.rope(q[i], k[i], positions[i], **kwargs), tuple(x[i] for x in whole)
        )

    def f(q, k, p):
        return ops.rope(q, k, p, **kwargs)

    torch.testing.assert_close(vmap(f)(q, k, positions), whole)
    # A rotation is linear: its tangent is itself.
    t = (torch.randn_like(q), torch.randn_like(k))
    pushed = jvp(lambda q, k: f(q, k, positions), (q, k), t)[1]
    torch.testing.assert_close(pushed, f(*t, positions))


def test_frequencies_on_their_own():
    inv_freq, factor = ops.rope_frequencies(8, theta=16.0)
    torch.testing.assert_close(inv_freq, torch.tensor([1.0, 0.5, 0.25, 0.125]))
    assert factor == 1.0
    scaling = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "factor": 4}
    scaling["original_max_position_embeddings"] = 16
    for seq_len, want in ((None, 1.0), (16, 1.0), (17, 0.5), (torch.tensor(17), 0.5)):
        inv_freq, factor = ops.rope_frequencies(2, theta=9.0, scaling=scaling, seq_len=seq_len)
        assert inv_freq.item() == want
    assert factor == pytest.approx(math.sqrt(1.5))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "ntk"}, r'unknown rope_type "ntk"[\s\S]*default, linear, dynamic'),
        ({"type": "su"}, r'fix: +rope_type="longrope"'),
        ({"rope_type": "yarn", "type": "linear", "factor": 2}, "disagree"),
        ({"rope_type": "linear"}, r"missing: factor[\s\S]*fix: +add factor"),
        (
            {"rope_type": "linear", "factor": 2, "mrope_section": [1], "x": 1},
            r"unknown: mrope_section, x[\s\S]*leave out mrope_section, x",
        ),
        ({"rope_type": "llama3", "factor": 8}, "missing: low_freq_factor, high_freq_factor"),
        (LLAMA3, "needs original_max_position_embeddings"),
        ({"rope_type": "dynamic", "factor": 2}, "max_position=cfg.max_position_embeddings"),
        (
            {**LONGROPE, "short_factor": [1.0], "original_max_position_embeddings": 8, "factor": 2},
            r"got: +1 for rotary_dim=16[\s\S]*a list of 8",
        ),
        ({"rope_theta": 5.0}, r"fix: +theta=5.0"),
        ({"rope_type": "linear", "factor": "2"}, "factor is no number"),
    ],
)
def test_config_errors_name_the_fix(scaling, message):
    q, k, positions = inputs(3)
    with pytest.raises(ConfigError, match=message):
        ops.rope(q, k, positions, theta=THETA, scaling=scaling)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.arange(3)}, r"positions.expand\(2, 3\)"),
        ({"positions": torch.zeros(2, 4)}, r"q.transpose\(-3, -2\)"),
        ({"k": torch.zeros(2, 3, 2, 8)}, "differ in more than their heads"),
        ({"rotary_dim": 20}, r"fix: +rotary_dim=16"),
        ({"rotary_dim": 8, "scaling": {"partial_rotary_factor": 0.25}}, r"fix: +rotary_dim=4"),
    ],
)
def test_shape_errors_name_the_fix(change, message):
    q, k, positions = inputs(3)
    arguments = {"q": q, "k": k, "positions": positions, "theta": THETA, **change}
    with pytest.raises(ShapeError, match=message):
        ops.rope(**arguments)


def test_odd_rotary_dim_is_refused():
    with pytest.raises(ConfigError, match=r"fix: +rotary_dim=4"):
        ops.rope_frequencies(5, theta=THETA)
