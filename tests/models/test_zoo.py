"""Every model of the zoo against `transformers`, and what its config reads and refuses."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import funcmodels as fm
from funcmodels.errors import ConfigError
from funcmodels.models.registry import ZOO
from tests.models.zoo import Row, rows
from tests.tiny_llama import state_dict

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

ROWS = rows()
SIZES = [(name, size) for name, row in ROWS.items() for size in row.published]
VARIATIONS = [(name, v) for name, row in ROWS.items() for v in ("", *row.variations)]
FAULTS = [(name, fault) for name, row in ROWS.items() for fault in row.faults]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EVERY_ROW = pytest.mark.parametrize("name", ROWS)

LENGTH = 40  # above every window of the rows


def tokens_of(row: Row) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, row.hf["vocab_size"], (2, LENGTH), generator=generator)


def peer_of(row: Row, folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model of a folder; its rotary tables stay in float32, whatever the dtype."""
    kind = getattr(transformers, row.architecture)
    peer = kind.from_pretrained(folder, dtype=dtype, attn_implementation=row.peer).eval()
    row.amend(peer)
    return peer


def loss_of(task: str, result: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of logits, the mean loss of the next token; of other vectors, some mean of them."""
    if task == "generate":
        return F.cross_entropy(result[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    some = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
    return (result.float() * some).mean()


def ours(row: Row, model: fm.Model, weights: Any, tokens: torch.Tensor):
    """Logits, the stream after each layer, and gradients of the mean loss by torch.func."""
    positions = torch.arange(LENGTH).expand(tokens.shape)

    def loss(weights: Any):
        result = model.forward(weights, tokens, positions)
        if model.task == "classify":  # transformers returns the pooled ones alone
            result = result[:, -1]
        return loss_of(model.task, result, tokens), result

    grads, logits = torch.func.grad(loss, has_aux=True)(weights)
    states: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        if row.layer:
            layer = getattr(row.zoo, row.layer)
            patch.setattr(row.zoo, row.layer, lambda *a, **kw: kept(states, layer(*a, **kw)))
        model.forward(weights, tokens, positions)
    return logits, states, state_dict(model, grads)


def kept(states: list[torch.Tensor], result: Any) -> Any:
    """A layer's result, whose first tensor is the stream, remembered."""
    states.append(result[0] if isinstance(result, tuple) else result)
    return result


def theirs(row: Row, module: Any, task: str, tokens: torch.Tensor, folder: Path):
    """The same of transformers; gradients under the checkpoint's names, as it writes weights."""
    out = module(tokens, output_hidden_states=True)
    result = out.last_hidden_state if task == "embed" else out.logits
    loss_of(task, result, tokens).backward()
    for parameter in module.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for buffer in module.buffers():  # written with the weights, and without a gradient
        buffer.zero_()
    module.save_pretrained(folder)
    grads = load_file(folder / "model.safetensors")
    states = out.hidden_states[row.embeddings_first : -1]  # the last is normalised
    return result.detach(), [h.detach() for h in states], grads


def compare(row: Row, folder: Path, dtype: torch.dtype, variation: str = "", **fault: Any) -> None:
    """float32: equal to rounding. bfloat16: no further from transformers' float32 than its own is.

    `fault`: fields changed on our side alone, once the weights are drawn.
    """
    changes = row.no_choice if dtype == torch.bfloat16 else {}
    model = row.model(variation, **changes)
    weights = row.weights(model, dtype)
    fm.save(model, weights, folder / "weights")
    tokens = tokens_of(row)
    peer = peer_of(row, folder / "weights", dtype)
    peer_logits, peer_states, peer_grads = theirs(row, peer, model.task, tokens, folder / "grads")
    model = row.model(variation, **changes, **fault)
    logits, states, grads = ours(row, model, weights, tokens)
    assert logits.dtype == dtype
    assert peer_logits.square().mean() > 0.25, "logits near zero compare nothing"
    assert grads.keys() == read_by(model, peer_grads)
    assert not row.layer or len(states) == len(peer_states) + row.embeddings_first
    pairs = [(logits, peer_logits), *zip(states, peer_states, strict=False)]
    if dtype == torch.float32:
        for mine, peers in pairs:
            torch.testing.assert_close(mine, peers, rtol=1e-4, atol=3e-5)
        for key, grad in grads.items():
            torch.testing.assert_close(grad, peer_grads[key], rtol=1e-3, atol=4e-6, msg=key)
        return
    wide = peer_of(row, folder / "weights", torch.float32)
    right_logits, right_states, exact = theirs(row, wide, model.task, tokens, folder / "exact")
    for (mine, peers), right in zip(pairs, [right_logits, *right_states], strict=False):
        noise = 1.3 if right.numel() > 100 else 5  # of a few scores, one may be off by luck
        assert error(mine, right) < noise * error(peers, right) < noise * 0.06
    # One tensor's ratio is noise, most for the small biases; the mean over the tensors is not.
    ratios = {k: error(g, exact[k]) / error(peer_grads[k], exact[k])
              for k, g in grads.items() if exact[k].norm() > 0}  # fmt: skip
    assert statistics.geometric_mean(ratios.values()) < 1.3
    assert max(ratios.values()) < 5, ratios


def read_by(model: fm.Model, names: Iterable[str]) -> set[str]:
    """Without the tensors that a model passes over, such as a head that it has not."""
    return {n for n in names if not any(fnmatch(n, pattern) for pattern in model.hf_ignored)}


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((value.float() - exact).norm() / exact.norm())


@DTYPES
@pytest.mark.parametrize(("name", "variation"), VARIATIONS)
def test_equals_transformers(name, variation, dtype, tmp_path):
    """Logits, hidden states and gradients."""
    compare(ROWS[name], tmp_path, dtype, variation)


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_planted_fault_is_seen(name, fault, tmp_path):
    """The comparison itself: a field of the config that means something else on our side."""
    row = ROWS[name]
    with pytest.raises(AssertionError):
        compare(row, tmp_path, torch.float32, **row.faults[fault])


def test_a_planted_fault_of_gradients_is_seen(tmp_path, monkeypatch):
    """Of gradients alone: the values are the same, to the bit."""
    row = ROWS["qwen3"]
    embed = row.zoo.ops.embed

    def faulty(tokens, table):
        x = embed(tokens, table)
        return x + 0.01 * (x - x.detach())

    monkeypatch.setattr(row.zoo.ops, "embed", faulty)
    with pytest.raises(AssertionError, match=r"embed_tokens\.weight"):
        compare(row, tmp_path, torch.float32)


@EVERY_ROW
def test_tensors_are_written_back_bit_identical(name, tmp_path):
    """What transformers wrote, found by its architecture, loaded and saved again."""
    row = ROWS[name]
    kind = getattr(transformers, row.architecture)
    fields = {key: v for key, v in row.fields().items() if key != "model_type"}
    peer = kind._from_config(kind.config_class(**fields), dtype=torch.bfloat16)
    for value in peer.state_dict().values():  # norms all of ones would be as good as one another
        if value.is_floating_point():
            value.add_(0.1 * torch.randn_like(value))
    peer.save_pretrained(tmp_path / "theirs")
    model = fm.load_model(tmp_path / "theirs")
    assert type(model.config) is row.zoo.Config
    fm.save(model, fm.load(model, tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "ours"))
    assert ours.keys() == read_by(model, theirs)
    maps = model.tensor_maps.items()
    dtypes = {name: t for p, m in maps for name in m.names if (t := model.by_path[p].dtype)}
    for key, value in ours.items():
        want = theirs[key].to(dtypes.get(key, torch.bfloat16))
        assert value.dtype == want.dtype
        assert theirs[key].dtype in (torch.bfloat16, value.dtype)
        assert torch.equal(value.view(torch.int16), want.view(torch.int16)), key
    again = fm.load_model(tmp_path / "ours")
    assert again.config == model.config
    told = kind.from_pretrained(tmp_path / "ours").config.to_dict()
    assert row.zoo.Config.from_hf(told) == model.config


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_published_configs(name, size):
    """Read and written back as they are, but not quantised; as many parameters as published."""
    row = ROWS[name]
    published = row.published[size]
    cfg = row.zoo.Config.from_hf(published.config)
    plain = {key: v for key, v in published.config.items() if key != "quantization_config"}
    assert cfg.to_hf() == plain
    assert row.zoo.model(cfg).num_parameters == published.parameters


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_published_configs_as_transformers_tells_them(name, size):
    """vLLM hands a model what transformers made of config.json, which adds fields of its own."""
    row = ROWS[name]
    fields = dict(row.published[size].config)
    kind = getattr(transformers, row.architecture).config_class
    told = kind(**{key: v for key, v in fields.items() if key != "model_type"}).to_dict()
    assert row.zoo.Config.from_hf(told) == row.zoo.Config.from_hf(fields)


@pytest.mark.parametrize(("name", "variation"), VARIATIONS)
def test_a_config_made_from_fields_is_the_same(name, variation):
    """to_hf is the inverse of from_hf, and transformers reads what it writes alike."""
    row = ROWS[name]
    cfg = row.zoo.Config.from_hf(row.fields(variation))
    values = {key: value for key, value in vars(cfg).items() if key != "hf"}
    written = row.zoo.Config(**values).to_hf()
    assert row.zoo.Config.from_hf(written) == cfg
    kind = getattr(transformers, row.architecture).config_class
    told = kind(**{key: v for key, v in written.items() if key != "model_type"}).to_dict()
    assert row.zoo.Config.from_hf(told) == cfg


@EVERY_ROW
def test_fields_left_out_are_what_transformers_takes_them_for(name):
    row = ROWS[name]
    needed = [f.name for f in dataclasses.fields(row.zoo.Config)
              if f.default is dataclasses.MISSING and not f.metadata]  # fmt: skip
    fields = {key: row.hf[key] for key in ("model_type", *needed) if key in row.hf}
    kind = getattr(transformers, row.architecture).config_class
    told = kind(**{key: v for key, v in fields.items() if key != "model_type"}).to_dict()
    assert row.zoo.Config.from_hf(fields) == row.zoo.Config.from_hf(told)


INERT_THERE = {
    "bert": {
        "directionality": "bidi",
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
    },
    "qwen3_moe": {
        "qkv_bias": False,
        "shared_expert_intermediate_size": 0,
        "use_qk_norm": True,
    },
    "gpt2": {"output_past": True},
    "llama": {"_attn_implementation_autoset": True},
}


@pytest.mark.parametrize("name", INERT_THERE)
def test_published_fields_that_change_nothing(name):
    row, fields = ROWS[name], INERT_THERE[name]
    assert row.zoo.Config.from_hf({**row.hf, **fields}) == row.zoo.Config.from_hf(row.hf)


@pytest.mark.parametrize(
    "other", [{"qkv_bias": True}, {"shared_expert_intermediate_size": 64}, {"use_qk_norm": False}]
)
def test_the_same_fields_with_a_meaning_are_refused(other):
    row = ROWS["qwen3_moe"]
    with pytest.raises(ConfigError, match=f"does not support this {next(iter(other))}"):
        row.zoo.Config.from_hf({**row.hf, **other})


@EVERY_ROW
def test_an_unknown_field_is_refused(name):
    row = ROWS[name]
    with pytest.raises(ConfigError, match=r"does not know 1 of the .*\n +got: +hidden_twist=2"):
        row.zoo.Config.from_hf({**row.hf, "hidden_twist": 2})


@EVERY_ROW
def test_a_missing_size_is_refused(name):
    row = ROWS[name]
    layers = next(field for field in ("num_hidden_layers", "n_layer") if field in row.hf)
    with pytest.raises(ConfigError, match=rf"need: +{layers}"):
        row.zoo.Config.from_hf({**row.hf, layers: None})


@EVERY_ROW
def test_both_names_are_in_the_registry(name):
    row = ROWS[name]
    model = row.model()
    for architecture in (model.name, *model.hf_architectures, row.architecture):
        assert ZOO[architecture] == f"funcmodels.models.{row.module}"


@EVERY_ROW
def test_what_is_not_served_has_a_reason(name):
    """Adapters, int8 and vLLM's own class: tested on the engine, or the row says why not."""
    row = ROWS[name]
    assert bool(row.linears) != bool(row.no_adapters)
    assert not row.no_int8 or not row.unquantised
    assert bool(row.vllm) != bool(row.no_vllm)
    assert row.vllm or row.no_int8, "int8 is compared with vLLM's own class"


@EVERY_ROW
def test_packed_sequences_equal_separate_ones(name):
    """`segment_ids` reach every layer, and tokens need no batch."""
    row = ROWS[name]
    model = row.model()
    weights = row.weights(model)
    a, b = tokens_of(row)
    packed = torch.cat((a, b[:9]))
    positions = torch.cat((torch.arange(LENGTH), torch.arange(9)))
    segment_ids = torch.tensor([0] * LENGTH + [1] * 9)
    out = model.forward(weights, packed, positions, segment_ids)
    alone = model.forward(weights, b[:9], torch.arange(9))
    torch.testing.assert_close(out[LENGTH:], alone, rtol=1e-4, atol=2e-5)
