"""The layers on one process: ordinary torch, and what they refuse."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import CheckpointError, ShapeError, TrainingError
from tests.nn.modules import EPS, HIDDEN, INNER, MLP, VOCAB, decoder, tokens


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_linears_are_torchs():
    x = torch.randn(2, 3, HIDDEN)
    for layer in (
        fm.nn.ColumnParallelLinear(HIDDEN, INNER, bias=True),
        fm.nn.RowParallelLinear(HIDDEN, INNER, bias=True),
        fm.nn.ColumnParallelLinear(HIDDEN, INNER, gather_output=True),
        fm.nn.RowParallelLinear(HIDDEN, INNER, input_is_parallel=False),
    ):
        bias = layer.bias is not None
        if bias:
            nn.init.normal_(layer.bias)
        same = nn.Linear(HIDDEN, INNER, bias=bias)
        same.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), same(x), rtol=0, atol=1e-6)


def test_the_others_are_the_ops():
    ids, x = torch.randint(VOCAB, (2, 3)), torch.randn(2, 3, HIDDEN)
    embed, head = fm.nn.VocabParallelEmbedding(VOCAB, HIDDEN), fm.nn.ParallelLMHead(VOCAB, HIDDEN)
    assert torch.equal(embed(ids), F.embedding(ids, embed.weight))
    assert torch.equal(head(x), F.linear(x, head.weight))
    want = F.cross_entropy(head(x).flatten(0, 1), ids.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(head.cross_entropy(x, ids, label_smoothing=0.1), want)
    norm, gemma = fm.nn.RMSNorm(HIDDEN, eps=EPS), fm.nn.RMSNorm(HIDDEN, eps=EPS, offset=1.0)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (HIDDEN,), eps=EPS))
    torch.testing.assert_close(gemma(x), norm(x))
    once, low = fm.nn.RMSNorm(HIDDEN, eps=EPS, rounds_once=True).bfloat16(), x.bfloat16()
    nn.init.normal_(once.weight)
    want = ops.rms_norm(low, once.weight, eps=EPS, rounds_once=True)
    assert torch.equal(once(low), want)
    assert not torch.equal(want, ops.rms_norm(low, once.weight, eps=EPS))
    want = F.layer_norm(x, (HIDDEN,), eps=EPS)
    torch.testing.assert_close(fm.nn.LayerNorm(HIDDEN, eps=EPS)(x), want)
    assert fm.nn.LayerNorm(HIDDEN, eps=EPS, bias=False).bias is None
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8)
    places = torch.arange(3).expand(2, 3)
    rope = fm.nn.RotaryEmbedding(8, theta=50.0, rotary_dim=4, interleaved=True)
    want = ops.rope(q, k, places, theta=50.0, rotary_dim=4, interleaved=True)
    for got, ref in zip(rope(q, k, places), want, strict=True):
        assert torch.equal(got, ref)


def test_what_they_start_from():
    layer = fm.nn.ColumnParallelLinear(400, 300, bias=True)
    assert abs(layer.weight.std().item() * 20 - 1) < 0.02
    assert not layer.bias.any()
    table = fm.nn.VocabParallelEmbedding(300, 400).weight
    assert abs(table.std().item() * 20 - 1) < 0.02
    with torch.device("meta"):
        assert all(p.is_meta for p in MLP().parameters())
    assert fm.nn.RowParallelLinear(4, 4, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_they_train():
    module, rows = decoder(), tokens()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = module.loss(rows)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_transforms():
    module, rows = decoder(), tokens()
    params = {n: p.detach() for n, p in module.named_parameters()}

    def loss(params, rows):
        logits = torch.func.functional_call(module, params, (rows[..., :-1],))
        return F.cross_entropy(logits.flatten(0, -2), rows[..., 1:].flatten())

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close({n: g[i] for n, g in each.items()},
                                   torch.func.grad(loss)(params, row))  # fmt: skip


def test_whole_is_a_copy_and_loads_again():
    module = decoder()
    state = fm.nn.whole(module)
    assert set(state) == set(module.state_dict())
    again = fm.nn.load_whole(decoder(), {n: 2 * x for n, x in state.items()})
    for name, value in again.state_dict().items():
        assert torch.equal(value, 2 * module.state_dict()[name])
    assert again.head.weight is again.embed.weight
    del state["head.weight"]  # the other name of the embedding's
    fm.nn.load_whole(again, state)
    assert torch.equal(again(tokens()), module(tokens()))
    assert torch.equal(copy.deepcopy(module)(tokens()), module(tokens()))


def test_what_is_loaded_must_be_the_module():
    module = MLP()
    state = fm.nn.whole(module)
    with pytest.raises(CheckpointError, match=r"missing: up.bias\n +unknown: other"):
        fm.nn.load_whole(module, {("other" if n == "up.bias" else n): x for n, x in state.items()})
    with pytest.raises(ShapeError, match=r"up.bias is not the whole[\s\S]*\(12,\)[\s\S]*\(24,\)"):
        fm.nn.load_whole(module, state | {"up.bias": state["up.bias"][:12]})
    with torch.device("meta"):
        empty = MLP()
    with pytest.raises(TrainingError, match=r"hold nothing[\s\S]*to_empty"):
        fm.nn.load_whole(empty, state)


def test_inside_a_pure_function(tmp_path):
    """A module, called with the parameters of a model, is compiled as what it consists of."""
    module = MLP().double()
    held = {name.replace(".", "_"): x.detach() for name, x in module.named_parameters()}
    axes, declare = {HIDDEN: "hidden", INNER: "inner"}, fm.axes(hidden=HIDDEN, inner=INNER)

    @fm.block
    def mlp(p, x):
        named = {name: p[name.replace(".", "_")] for name, _ in module.named_parameters()}
        return torch.func.functional_call(module, named, (x,))

    def forward(params, ids, positions, segment_ids=None):
        return ops.unembed(mlp(params["mlp"], ops.embed(ids, params["embed"])), params["embed"])

    model = fm.Model(
        "AroundAModule",
        config={"max_position_embeddings": 64},
        params={
            "embed": fm.axes(vocab=VOCAB, hidden=HIDDEN)("vocab hidden"),
            "mlp": {n: declare(" ".join(axes[size] for size in x.shape)) for n, x in held.items()},
        },
        forward=forward,
        sharding={"vocab": "tp", "inner": "tp"},
    )
    table = torch.randn(VOCAB, HIDDEN, dtype=torch.float64)
    places = torch.arange(tokens().shape[1]).expand(tokens().shape)
    weights = {"embed": table, "mlp": held}
    want = module(table[tokens()]) @ table.T
    torch.testing.assert_close(model.forward(weights, tokens(), places), want)
    fm.verify(model, weights, tokens().tolist(), tp=2)
    source = fm.emit(model, tmp_path / "model.py").read_text()
    kinds = re.findall(r"self\.\w+ = (\w+Linear)\(", source)
    assert sorted(kinds) == ["ColumnParallelLinear"] * 3 + ["RowParallelLinear"] * 2


def test_features_that_do_not_fit():
    with pytest.raises(ShapeError, match=r"x \(2, 15\), rank 0 of 1[\s\S]*in_features=16"):
        fm.nn.ColumnParallelLinear(HIDDEN, 4)(torch.zeros(2, 15))
    with pytest.raises(ShapeError, match=r"targets must hold"):
        fm.nn.ParallelLMHead(VOCAB, HIDDEN).cross_entropy(torch.zeros(2, HIDDEN), torch.zeros(3))
