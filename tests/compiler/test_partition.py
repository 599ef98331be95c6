"""The partitioned program, on ranks, equals the unpartitioned one: values and gradients."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import funcmodels as fm
from compiler import evaluate
from compiler.comm import Processes, Simulated
from compiler.partition import Need, partition
from compiler.trace import trace
from funcmodels import ops
from funcmodels.errors import LoweringError
from tests.compiler.programs import (
    allowed,
    axes,
    check_on_ranks,
    inputs_of,
    on_ranks,
    small,
    weights_of,
)
from tests.compiler.random_programs import Spec, model_of, specs
from tests.distributed.ranks import mesh_of
from tests.distributed.ranks import on_ranks as on_processes
from tests.tiny_llama import tiny

RANKS = (1, 2, 3, 4)
# More, and other ones each time: FUNCMODELS_EXAMPLES=3000 pytest -k random_programs
EXAMPLES = int(os.environ.get("FUNCMODELS_EXAMPLES", "60"))
P = axes()


@functools.cache
def counts() -> dict[str, int]:
    """How many programs ran, and how many numbers of ranks were refused."""
    return dict.fromkeys(("programs", "runs", "refused", "gathered"), 0)


@given(specs(gathers=True))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 60,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
def random_programs(spec: Spec) -> None:
    model = model_of(spec)
    program = trace(model)
    local = partition(program)
    # Smaller, so that no softmax saturates, where gradients are differences of large numbers.
    weights = fm.tree.map(lambda w: 0.6 * w, weights_of(model))
    tokens, positions = inputs_of(5, vocab=dict(spec.sizes)["vocab"])
    counts()["programs"] += 1
    counts()["gathered"] += bool(local.gathered)
    for parts in RANKS:
        if not allowed(local, parts):
            counts()["refused"] += 1
            continue
        counts()["runs"] += 1
        check_on_ranks(program, local, parts, weights, tokens, positions, rtol=1e-8)


def test_random_programs(capsys):
    random_programs()
    with capsys.disabled():
        print(f"\n  random programs: {counts()}")
    assert counts()["programs"] >= 60
    assert counts()["runs"] >= 100
    assert counts()["gathered"] >= counts()["programs"] / 10  # else little of gathering is tested


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_llama(kv_heads, tied, bias):
    model = tiny(
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        vocab_size=96,
    )
    program = trace(model)
    local = partition(program, strict=True)
    assert [n for n in (1, 2, 3, 4) if allowed(local, n)] == [1, 2, 4]
    weights, (tokens, positions) = weights_of(model), inputs_of(6)
    for parts in (2, 4):
        check_on_ranks(program, local, parts, weights, tokens, positions, rtol=1e-8)


def test_batched():
    model = tiny(vocab_size=96)
    program = trace(model, batched=True)
    local = partition(program)
    check_on_ranks(program, local, 2, weights_of(model), *inputs_of(3, 5), rtol=1e-8)


def test_need():
    divided = Need("heads", 6, True, "", None)
    replicated = Need("kv_heads", 6, False, "", None)
    assert [n for n in range(1, 13) if divided.allows(n)] == [1, 2, 3, 6]
    assert [n for n in range(1, 13) if replicated.allows(n)] == [1, 2, 3, 6, 12]


def test_needs_of_llama():
    local = partition(trace(tiny(vocab_size=96)))
    exact = {need.axis: need.units for need in local.needs if need.exact}
    assert exact == {"vocab": 96, "heads": 4, "mlp": 48}
    assert ("kv_heads", 2) in {(n.axis, n.units) for n in local.needs if not n.exact}
    assert all(need.where.file.endswith(("llama.py", "embed.py")) for need in local.needs)


def test_kv_heads_that_are_whole_are_still_taken_in_blocks():
    """Query heads are cut, the whole KV heads must be: over 2 ranks 3 of them cannot be."""
    P = fm.axes(vocab=24, hidden=16, heads=6, kv_heads=3, head_dim=4)

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        q = torch.einsum("te,hde->thd", x, params["q"])
        k = torch.einsum("te,hde->thd", x, params["k"])
        o = ops.attention(q, k, k)
        return ops.unembed(torch.einsum("thd,hde->te", o, params["q"]), params["head"])

    params = {"q": P("heads head_dim hidden"), "k": P("kv_heads head_dim hidden")}
    local = partition(trace(small(forward, params, {"heads": "tp"})))
    assert [n for n in (1, 2, 3, 6) if allowed(local, n)] == [1, 3, 6]


def test_one_axis_name_of_two_sizes():
    """The exact need of one must not hide that the other's blocks lie on several ranks."""
    wide, narrow = fm.axes(units=4, hidden=16), fm.axes(units=2, hidden=16)

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        x = x + (x @ params["wide"].T) @ params["wide"]
        h = x[..., :2] * (params["narrow"] ** 2).sum(-1)
        return ops.unembed(torch.cat((h, x[..., 2:]), -1), params["head"])

    model = small(
        forward,
        {"wide": wide("units hidden"), "narrow": narrow("units hidden")},
        {"units": "tp"},
    )
    program = trace(model)
    local = partition(program)
    assert allowed(local, 4)
    check_on_ranks(program, local, 4, weights_of(model), *inputs_of(5))


def test_strict_refuses_with_the_line():
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        h = torch.cumsum(x @ params["up"].T, -1)
        return ops.unembed(x + h @ params["up"], params["head"])

    program = trace(small(forward, {"up": P("mlp hidden")}, {"mlp": "tp"}))
    with pytest.raises(LoweringError, match=r"no sharding rule for torch\.cumsum") as error:
        partition(program, strict=True)
    assert str(error.value.lines["from"]).startswith("test_partition.py:")
    assert "strict=False" in error.value.lines["fix"]
    (gathered,) = partition(program).gathered
    assert (gathered.operation, gathered.block) == ("torch.cumsum", "forward")


# Over torch.distributed


def _process(model_args: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = tiny(**model_args)
    local = partition(trace(model))
    comm = Processes(mesh_of(tp=2).get_group("tp"))
    weights, (tokens, positions) = weights_of(model), inputs_of(6)
    shards = {
        path: [v.detach().clone().requires_grad_() for v in values]
        for path, values in evaluate.local_weights(local, weights, comm).items()
    }
    (logits,) = evaluate.run(local, shards, tokens, positions, comm)
    names, leaves = zip(*((p, v[0]) for p, v in shards.items()), strict=True)
    grads = torch.autograd.grad(logits.square().sum(), leaves)
    return logits.detach(), dict(zip(names, grads, strict=True))


@pytest.mark.slow
def test_processes_equal_simulated_ranks():
    args = {"vocab_size": 96, "num_key_value_heads": 1, "tie_word_embeddings": True}
    found = on_processes(2, _process, args)
    model = tiny(**args)
    local = partition(trace(model))
    weights, (tokens, positions) = weights_of(model), inputs_of(6)
    comm = Simulated(2)
    shards = {
        path: [v.detach().clone().requires_grad_() for v in values]
        for path, values in evaluate.local_weights(local, weights, comm).items()
    }
    logits = evaluate.run(local, shards, tokens, positions, comm)
    leaves = [v for values in shards.values() for v in values]
    grads = iter(torch.autograd.grad(sum(one.square().sum() for one in logits), leaves))
    for rank in range(2):
        torch.testing.assert_close(found[rank][0], logits[rank].detach())
    for path in shards:
        for rank in range(2):
            torch.testing.assert_close(found[rank][1][path], next(grads))


def test_simulated_ranks_take_blocks():
    model = tiny(vocab_size=96)
    local = partition(trace(model))
    weights = weights_of(model)
    shards = evaluate.local_weights(local, weights, Simulated(4))
    whole = dict(fm.tree.items(weights))
    assert [v.shape for v in shards["layers.0.attn.k"]] == [(1, 8, 32)] * 4
    torch.testing.assert_close(shards["layers.0.attn.k"][1], whole["layers.0.attn.k"][:1])
    torch.testing.assert_close(shards["layers.0.attn.k"][2], whole["layers.0.attn.k"][1:])
    logits = on_ranks(local, weights, *inputs_of(4), Simulated(4))
    assert all(torch.equal(one, logits[0]) for one in logits)
