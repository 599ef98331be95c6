"""What the zoo's comparisons must see: faults in bfloat16, of a tensor's name, and of a round trip.

tests/models/test_zoo.py plants faults of each row's config in float32. In bfloat16 those are seen
that change more than its rounding does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import funcmodels as fm
from tests.models import test_zoo
from tests.models.test_zoo import ROWS, compare

torch.set_num_threads(1)

# Faults that are no larger than rounding, and those of routers that choose: here all are chosen.
SMALL = {
    "gemma2": ("scale",),
    "glm4_moe": ("k", "renormalised"),
    "gpt_oss": ("k",),
    "granite_moe_hybrid": ("k",),
    "lfm2": ("theta",),
    "mixtral": ("k",),
    "olmoe": ("k", "renormalised"),
    "qwen3_moe": ("k", "renormalised"),
    "qwen3_next": ("k", "renormalised"),
}
LARGE = {name: next(fault for fault in row.faults if fault not in SMALL.get(name, ()))
         for name, row in ROWS.items()}  # fmt: skip
QUICK = ("llama", "gemma2", "gpt2", "bert")
NARROW = ["llama", "qwen3", "gemma2", "gpt2", "mixtral", "bert"]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LARGE]
)
def test_a_large_fault_is_seen_in_bfloat16(name, tmp_path):
    row = ROWS[name]
    with pytest.raises(AssertionError):
        compare(row, tmp_path, torch.bfloat16, **row.faults[LARGE[name]])


@pytest.mark.parametrize("name", NARROW)
def test_narrower_keys_are_seen_in_bfloat16(name, tmp_path, monkeypatch):
    """A fault that float32 does not have: keys of 8 bits where the others are of 16."""
    row = ROWS[name]
    attention = row.zoo.ops.attention

    def faulty(q, k, v, **settings):
        is_narrow = k.dtype == torch.bfloat16
        k = k.to(torch.float8_e4m3fn).to(k.dtype) if is_narrow else k
        return attention(q, k, v, **settings)

    monkeypatch.setattr(row.zoo.ops, "attention", faulty)
    with pytest.raises(AssertionError):
        compare(row, tmp_path, torch.bfloat16)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_layer_norm_in_bfloat16_is_seen(name, tmp_path, monkeypatch):
    """Its statistics rounded to bfloat16, where they are float32."""

    def faulty(x, weight, bias, *, eps):
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight + bias

    row = ROWS[name]
    monkeypatch.setattr(row.zoo.ops, "layer_norm", faulty)
    with pytest.raises(AssertionError):
        compare(row, tmp_path, torch.bfloat16)


# Two parameters of the same axes in each layer.
SWAPPED = {
    "gate and up": ("llama", "mlp.gate", "mlp.up"),
    "keys and values": ("qwen3", "attn.k", "attn.v"),
    "norms of queries and keys": ("qwen3", "attn.q_norm", "attn.k_norm"),
    "norms after": ("gemma2", "post_attn_norm", "post_mlp_norm"),
    "gate and up of experts": ("mixtral", "moe.gate", "moe.up"),
    "parts of one tensor": ("gpt2", "attn.q", "attn.k"),
    "queries and keys": ("bert", "attn.q", "attn.k"),
}
EVERY_SWAP = pytest.mark.parametrize("swap", SWAPPED)


def with_swapped_names(zoo: Any, one: str, other: str, patch: pytest.MonkeyPatch) -> None:
    """Let the models of a file take two parameters of each layer from each other's tensors."""
    params = zoo.params

    def faulty(cfg: Any) -> Any:
        tree = params(cfg)
        by_path = dict(fm.tree.items(tree))

        def renamed(path: str, param: Any) -> Any:
            for mine, twin in ((one, other), (other, one)):
                if path.endswith(f".{mine}"):
                    name = by_path[path.removesuffix(mine) + twin].hf
                    return dataclasses.replace(param, hf=name)
            return param

        return fm.tree.map_with_path(renamed, tree)

    patch.setattr(zoo, "params", faulty)


@EVERY_SWAP
def test_swapped_names_are_seen(swap, tmp_path, monkeypatch):
    """By the comparison with transformers, which reads what is written under them."""
    name, one, other = SWAPPED[swap]
    row = ROWS[name]
    with_swapped_names(row.zoo, one, other, monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        compare(row, tmp_path, torch.float32)


@EVERY_SWAP
def test_names_swapped_on_reading_are_seen_by_the_round_trip(swap, tmp_path, monkeypatch):
    name, one, other = SWAPPED[swap]
    zoo, load = ROWS[name].zoo, fm.load

    def faulty(model, folder):
        with pytest.MonkeyPatch.context() as patch:
            with_swapped_names(zoo, one, other, patch)
            return load(zoo.model(model.config), folder)

    monkeypatch.setattr(fm, "load", faulty)
    with pytest.raises(AssertionError):
        test_zoo.test_tensors_are_written_back_bit_identical(name, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_one_bit_is_seen_by_the_round_trip(name, tmp_path, monkeypatch):
    save = fm.save

    def faulty(model, weights, folder):
        last = list(fm.tree.leaves(weights))[-1]
        last.view(torch.int16).view(-1)[-1] ^= 1
        save(model, weights, folder)

    monkeypatch.setattr(fm, "save", faulty)
    with pytest.raises(AssertionError):
        test_zoo.test_tensors_are_written_back_bit_identical(name, tmp_path)
