"""What is computed of one parameter alone: where the emitted file computes it when it is loaded."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import funcmodels as fm
from compiler.vllm_target import source_for_vllm
from funcmodels import ops

P = fm.axes(vocab=64, hidden=32, mlp=48, wide=70_000)


def source_of(read: Any, declared: Any = None) -> str:
    """The file of a model that scales its stream by what `read` makes of a gain."""

    @fm.block
    def scaled(p, x):
        return (x * read(p["gain"])).to(x.dtype)

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for p in params["layers"]:
            x = x + scaled(p, x)
        return ops.unembed(x, params["embed"])

    gain = declared or P("hidden", hf="layers.{layers}.gain")
    params = {"embed": P("vocab hidden", hf="embed.weight"), "layers": [{"gain": gain}] * 2}
    config = {"max_position_embeddings": 64}
    return source_for_vllm(fm.Model("Scaled", config, params, forward, {"vocab": "tp"}))


COMPUTED = {
    "a cast": lambda g: g.float(),
    "reshaped": lambda g: g.reshape(2, 16).float().exp().flatten(),
    "a difference of which more is made": lambda g: (2.0 - g.float()) * 3.0,
    "negated": lambda g: -g.sigmoid(),
    "clamped": lambda g: g.float().clamp(-0.5, 0.25) ** 2,
}


@pytest.mark.parametrize("what", COMPUTED)
def test_what_the_loader_computes_is_what_the_function_does(what):
    read = COMPUTED[what]
    source = source_of(read)
    (text,) = re.findall(r"(lambda x: .*?),\s+self\.dtype", source)
    gain = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    found = eval(text, {"torch": torch})(gain)
    assert found.dtype == read(gain).dtype
    assert torch.equal(found.reshape(32), read(gain))
    forward = source[source.index("class ScaledScaled") :].partition("def forward")[2]
    assert re.search(r"x \* self\.gain\n", forward.partition("return")[0])


KEPT_AS_IT_IS = {
    "read twice": lambda g: g.float() * g,
    "a sum over its elements": lambda g: g.sum(),
    "moved": lambda g: g.reshape(4, 8).T.reshape(32),
    "only reshaped": lambda g: g.reshape(4, 8).reshape(32),
}


@pytest.mark.parametrize("what", KEPT_AS_IT_IS)
def test_what_is_kept_as_it_is(what):
    assert "computed_loader" not in source_of(KEPT_AS_IT_IS[what])


def test_a_large_matrix_takes_no_more_memory():
    """A cast to float32 is made at every step, of which the result is thrown away."""
    large = P("wide hidden", hf="layers.{layers}.gain")
    assert "computed_loader" not in source_of(lambda g: g.float().sum(0), large)
    assert "computed_loader" in source_of(lambda g: g.sigmoid().sum(0), large)
