"""Compiled training is one graph, made in the first step, whatever documents later rows hold."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import llama
from tests.tiny_llama import tiny, weights_of

VOCAB, LENGTH = 97, 16
# The documents of each step's two rows.
DOCUMENTS = ((5, 6, 5, 16), (3, 13, 9, 7), (16, 16))


def packed(sizes: tuple[int, ...], length: int = LENGTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(i * n for i, n in enumerate(sizes)))
    documents = [torch.randint(0, VOCAB, (n,), generator=generator) for n in sizes]
    batch = fm.pack(documents, length)
    assert batch["tokens"].shape == (2, length)
    return batch


def kept() -> fm.Model:
    return tiny(num_hidden_layers=1, tie_word_embeddings=True)


def computed_again() -> fm.Model:
    """The same, whose layer is computed again in the backward pass."""
    model = kept()
    layer = fm.block(remat=True)(llama.decoder_layer.__wrapped__)  # type: ignore[attr-defined]

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for p in params["layers"]:
            x = layer(p, x, positions, segment_ids, model.config)
        x = ops.rms_norm(x, params["norm"], eps=model.config.rms_norm_eps)
        return ops.unembed(x, params["embed"])

    return dataclasses.replace(model, forward=forward)


def loss_of(model: fm.Model, **options: Any) -> Callable[[Any, Any], torch.Tensor]:
    return lambda weights, batch: fm.loss(model, weights, batch, **options)


P = fm.axes(vocab=VOCAB, hidden=16, heads=2, key=8)


def recurrent() -> fm.Model:
    """One layer of the gated delta rule."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        q, k, v = (ops.einsum(x, params[n], "... e, h d e -> ... h d") for n in "qkv")
        decay, beta = (ops.einsum(x, params[n], "... e, h e -> ... h") for n in ("decay", "beta"))
        decay, beta = -F.softplus(decay), torch.sigmoid(beta)
        y = ops.gated_delta_rule(q, F.normalize(k, dim=-1), v, decay, beta, segment_ids=segment_ids)
        return ops.unembed(x + y.flatten(-2), params["embed"])

    params = {name: P("heads key hidden") for name in "qkv"}
    params |= {name: P("heads hidden") for name in ("decay", "beta")}
    return fm.Model("Recurrent", {}, {"embed": P("vocab hidden"), **params}, forward)


compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
HOW: dict[str, Callable[[Any], Any]] = {
    "the loss is compiled": lambda loss: fm.grad_and_value(compiled(loss)),
    "the gradient is compiled": lambda loss: compiled(fm.grad_and_value(loss)),
    "the loss of parts is compiled": lambda loss: fm.accumulate(compiled(loss), 2),
}
CASES: dict[str, tuple[Callable[[], fm.Model], dict[str, Any], str]] = {
    "the loss": (kept, {}, "the loss is compiled"),
    "the gradient": (kept, {}, "the gradient is compiled"),
    "the loss of parts": (kept, {}, "the loss of parts is compiled"),
    "in chunks": (kept, {"chunk": 8, "z_loss": 0.01, "label_smoothing": 0.1},
                  "the gradient is compiled"),
    "computed again": (computed_again, {}, "the loss is compiled"),
}  # fmt: skip


def check(step: Callable, want: Callable, weights: Any, batches: list[Any], *, graphs: int = 1):
    """Steps with weights of their own, as an optimiser gives: the first `graphs` may compile."""
    for i, batch in enumerate(batches):
        given = fm.tree.map(lambda w, i=i: w * (1 + 0.1 * i), weights)
        with torch._dynamo.config.patch(error_on_recompile=i >= graphs):
            found = step(given, batch)
        torch.testing.assert_close(found, want(given, batch), rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_all_steps(name: str):
    torch._dynamo.reset()
    make, options, how = CASES[name]
    model = make()
    loss = loss_of(model, **options)
    want = fm.accumulate(loss, 2) if "parts" in how else fm.grad_and_value(loss)
    check(HOW[how](loss), want, weights_of(model), [packed(sizes) for sizes in DOCUMENTS])


@pytest.mark.slow
def test_rows_of_other_lengths_share_a_graph():
    """The second length makes it one of any length; chunks of the loss ask for their number."""
    torch._dynamo.reset()
    model = kept()
    batches = [packed((n // 2,) * 4, n) for n in (16, 24, 20, 12)]
    loss = loss_of(model)
    step = fm.grad_and_value(compiled(loss))
    check(step, fm.grad_and_value(loss), weights_of(model), batches, graphs=2)


@pytest.mark.slow
@pytest.mark.parametrize("is_packed", [False, True])
def test_recurrences_compile_once(is_packed: bool):
    """Packed rows are cut into other numbers of chunks each time: outside of the graphs."""
    torch._dynamo.reset()
    model = recurrent()
    batches = [packed(sizes) for sizes in DOCUMENTS]
    if not is_packed:
        batches = [{"tokens": batch["tokens"]} for batch in batches]
    loss = loss_of(model)
    fast = torch.compile(loss, backend="aot_eager", fullgraph=not is_packed)
    step = fm.grad_and_value(fast)
    check(step, fm.grad_and_value(loss), weights_of(model), batches)
