"""Llama against `transformers`, on logits and on gradients, and what its config refuses."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

import funcmodels as fm
from funcmodels.errors import ConfigError
from funcmodels.models import llama
from tests.tiny_llama import HF, state_dict, tiny, weights_of

torch.set_num_threads(1)

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
}


def peer(hf: dict[str, Any], dtype: torch.dtype) -> transformers.LlamaForCausalLM:
    """transformers' Llama; its rotary table stays in float32, as from_pretrained leaves it."""
    config = transformers.LlamaConfig(**{k: v for k, v in hf.items() if k != "model_type"})
    return transformers.LlamaForCausalLM._from_config(
        config, dtype=dtype, attn_implementation="eager"
    )


def tokens_of(length: int) -> torch.Tensor:
    return torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(1))


def ours(model: fm.Model, weights: Any, tokens: torch.Tensor):
    """Logits, and gradients of the mean loss by torch.func."""

    def loss(weights):
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        logits = model.forward(weights, tokens, positions)
        return loss_of(logits, tokens), logits

    grads, logits = torch.func.grad(loss, has_aux=True)(weights)
    return logits, state_dict(model, grads)


def theirs(module: transformers.LlamaForCausalLM, tokens: torch.Tensor):
    logits = module(tokens).logits
    loss_of(logits, tokens).backward()
    return logits.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def compare(hf: dict[str, Any], dtype: torch.dtype, length: int) -> None:
    """float32: equal to rounding. bfloat16: no further from float32 than transformers is."""
    model = tiny(**hf)
    weights = weights_of(model, dtype)
    tokens = tokens_of(length)
    module = peer({**HF, **hf}, dtype)
    result = module.load_state_dict(state_dict(model, weights), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}  # when tied
    logits, grads = ours(model, weights, tokens)
    peer_logits, peer_grads = theirs(module, tokens)
    assert grads.keys() == peer_grads.keys()
    assert logits.dtype == dtype
    assert peer_logits.std() > 0.5
    if dtype == torch.float32:
        torch.testing.assert_close(logits, peer_logits, rtol=1e-4, atol=2e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, peer_grads[name], rtol=1e-3, atol=2e-6, msg=name)
        return
    exact = fm.tree.map(torch.Tensor.float, weights)
    exact_logits, exact_grads = ours(model, exact, tokens)
    assert error(logits, exact_logits) < 1.3 * error(peer_logits, exact_logits) < 0.05
    # One tensor's ratio is noise, 0.3 to 2.9 over 36 draws, most for the small biases; the mean
    # over the tensors is not: each kind of tensor averaged 1.00 to 1.05 there.
    ratios = {n: error(g, exact_grads[n]) / error(peer_grads[n], exact_grads[n])
              for n, g in grads.items()}  # fmt: skip
    assert statistics.geometric_mean(ratios.values()) < 1.3
    assert max(ratios.values()) < 5, ratios
    assert max(error(g, exact_grads[n]) for n, g in grads.items()) < 0.15


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((value.float() - exact).norm() / exact.norm())


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_equals_transformers(kv_heads, tied, bias, dtype):
    hf = {
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "attention_bias": bias,
        "mlp_bias": bias,
    }
    compare(hf, dtype, length=12)


@DTYPES
@pytest.mark.parametrize("length", [12, 80])  # below every limit of ROPES, and above
@pytest.mark.parametrize("rope_type", ROPES)
def test_rope_scaling_equals_transformers(rope_type, length, dtype):
    rope = {"rope_type": rope_type, "rope_theta": 5000.0, **ROPES[rope_type]}
    compare({"rope_parameters": rope}, dtype, length)


def test_wide_heads_equal_transformers():
    compare({"head_dim": 16}, torch.float32, length=12)  # heads * head_dim is not hidden


MUTATIONS = {
    "rope sign": ("rope", lambda f: lambda q, k, pos, **kw: f(q, k, -pos, **kw)),
    "attention scale": ("attention", lambda f: lambda q, k, v, **kw: f(q, k, v, scale=1.0, **kw)),
    "not causal": ("attention", lambda f: lambda q, k, v, **kw: f(q, k, v, causal=False, **kw)),
    "norm offset": ("rms_norm", lambda f: lambda x, w, eps: f(x, w, eps=eps, offset=0.01)),
    "swapped gate": ("swiglu", lambda f: lambda gate, up: f(up, gate)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_sees_a_mutation(name, monkeypatch):
    op, mutate = MUTATIONS[name]
    monkeypatch.setattr(llama.ops, op, mutate(getattr(llama.ops, op)))
    with pytest.raises(AssertionError):
        compare({}, torch.float32, length=12)


def test_tokens_without_a_batch():
    model = tiny()
    weights = weights_of(model)
    tokens = tokens_of(9)
    positions = torch.arange(9)
    flat = model.forward(weights, tokens[1], positions)
    batched = model.forward(weights, tokens, positions.expand(2, 9))
    torch.testing.assert_close(flat, batched[1], rtol=1e-5, atol=1e-5)


def test_packed_sequences_equal_separate_ones():
    model = tiny()
    weights = weights_of(model)
    a, b = tokens_of(9)
    packed = torch.cat((a, b[:5]))
    positions = torch.cat((torch.arange(9), torch.arange(5)))
    segment_ids = torch.tensor([0] * 9 + [1] * 5)
    logits = model.forward(weights, packed, positions, segment_ids)
    alone = model.forward(weights, b[:5], torch.arange(5))
    torch.testing.assert_close(logits[9:], alone, rtol=1e-5, atol=1e-5)


def test_legacy_and_new_rope_spelling_are_one_config():
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    old = {**HF, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **rope}}
    new = {**HF, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **rope}}
    assert llama.Config.from_hf(old) == llama.Config.from_hf(new)
    assert hash(llama.Config.from_hf(old)) == hash(llama.Config.from_hf(new))
    both = llama.Config.from_hf({**old, **new})
    assert both == llama.Config.from_hf(new)


def test_transformers_own_dictionary_is_accepted():
    for rope_type, rope in ROPES.items():
        parameters = {"rope_type": rope_type, "rope_theta": 5000.0, **rope}
        hf = transformers.LlamaConfig(**HF, rope_parameters=parameters).to_dict()
        assert llama.Config.from_hf(hf).rope_theta == 5000.0


def test_a_changed_config_writes_what_it_is():
    hf = {**HF, "eos_token_id": 7, "rope_theta": 5000.0, "rope_scaling": None}
    cfg = llama.Config.from_hf(hf)
    assert cfg.to_hf() == hf
    changed = dataclasses.replace(cfg, num_hidden_layers=1)
    written = changed.to_hf()
    assert (written["num_hidden_layers"], written["eos_token_id"]) == (1, 7)
    assert llama.Config.from_hf(written) == changed
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize("rope_type", ROPES)
def test_to_hf_is_the_inverse_of_from_hf(rope_type):
    parameters = {"rope_type": rope_type, "rope_theta": 5000.0, **ROPES[rope_type]}
    cfg = llama.Config.from_hf({**HF, "rope_parameters": parameters, "mlp_bias": True})
    assert llama.Config.from_hf(dataclasses.replace(cfg, hf=None).to_hf()) == cfg


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"sliding_window": 128}, r"does not know 1 of the 11 fields"),
    "misspelt field": ({"rms_norm_epz": 1e-5}, r'did you mean "rms_norm_eps"\?'),
    "activation": ({"hidden_act": "gelu"}, r"got: +hidden_act='gelu'\n +need: +'silu'"),
    "model type": ({"model_type": "mistral"}, r"need: +'llama'"),
    "pretraining_tp": ({"pretraining_tp": 2}, r"does not support this pretraining_tp"),
    "dropout": ({"attention_dropout": 0.1}, r"does not support this attention_dropout"),
    "missing size": ({"hidden_size": None}, r"need: +hidden_size"),
    "groups": ({"num_key_value_heads": 3}, r"num_key_value_heads divides num_attention_heads"),
    "odd heads": ({"head_dim": 7}, r"need: +an even head_dim"),
    "rope type": ({"rope_scaling": {"rope_type": "mrope"}}, r"does not support this rope_type"),
    "rope field": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}},
        r"unknown beta; missing none",
    ),
    "rope without factor": ({"rope_scaling": {"type": "linear"}}, r"fix: +add factor"),
    "partial rope": ({"partial_rotary_factor": 0.5}, r"rotates whole heads"),
    "two thetas": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        r"two values of rope_theta",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_refuses(case):
    change, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        llama.Config.from_hf({**HF, **change})


def test_inert_fields_are_accepted():
    hf = {**HF, "use_cache": True, "bos_token_id": 1, "torch_dtype": "bfloat16",
          "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {},
          "sliding_window": None}  # fmt: skip
    assert llama.Config.from_hf(hf) == llama.Config.from_hf(HF)


def test_declarations_of_a_large_config_allocate_nothing():
    hf = {**HF, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
          "num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128,
          "vocab_size": 128256}  # fmt: skip
    model = llama.model(llama.Config.from_hf(hf))
    assert model.num_parameters == 405_853_388_800
    assert model.specs["layers.125.attn.o"] == fm.PartitionSpec(None, "tp", None)


def test_architectures_name_ours_first():
    model = tiny()
    assert model.name == "FmLlamaForCausalLM"
    assert model.hf_architectures == ("LlamaForCausalLM",)
