"""`fm.loss`: whatever a forward function does after its unembedding, the loss is of that."""

import functools

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.func import grad, grad_and_value, jvp, vmap

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import ShapeError, TaskError
from funcmodels.ops.deferred import Deferred, deferring
from tests.ops.test_loss import Largest
from tests.tiny_llama import tiny, weights_of

VOCAB, HIDDEN = 96, 8
P = fm.axes(vocab=VOCAB, hidden=HIDDEN, one=1)

# What follows the unembedding, and whether `ops.cross_entropy` can do it.
TAILS = {
    "nothing": (lambda x, p: x, True),
    "a factor": (lambda x, p: 0.5 * x * 3, True),
    "a divisor": (lambda x, p: x / 4, True),
    "torch.div": (lambda x, p: torch.div(x, 4), True),
    "a softcap": (lambda x, p: torch.tanh(x / 3.0) * 3.0, True),
    "a softcap of a factor, in float32": (lambda x, p: 2 * (0.7 * x.float() / 2).tanh(), True),
    "tanh of another size": (lambda x, p: 1.5 * torch.tanh(2 * x), True),
    "a softcap below zero": (lambda x, p: -3.0 * torch.tanh(x / 3.0), False),
    "two softcaps": (lambda x, p: torch.tanh(torch.tanh(x)), False),
    "a learned factor": (lambda x, p: x * p["factor"], False),
    "a learned factor in front": (lambda x, p: p["factor"] * x, False),
    "a bias": (lambda x, p: x + p["bias"], False),
    "a subtraction": (lambda x, p: 1 - x, False),
    "in place": (lambda x, p: x.clone().mul_(0.5), False),
    "part of the vocabulary": (lambda x, p: x[..., : VOCAB // 2], False),
    "a mask": (lambda x, p: torch.where(p["bias"] > 0, x, -5.0), False),
    "a norm": (lambda x, p: F.layer_norm(x, (VOCAB,)), False),
    "log_softmax": (lambda x, p: x.log_softmax(-1), False),
    "its size": (lambda x, p: x * x.shape[-1] ** -0.5, True),
    "comparison": (lambda x, p: x * (x > 0), False),
    "rounding": (lambda x, p: x.bfloat16(), False),
    "rearranged": (lambda x, p: rearrange(x + 0, "... v -> v ...").movedim(0, -1), False),
}


def model_of(tail):
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        return tail(ops.unembed(torch.tanh(x) + x, params["head"]), params)

    params = {name: P("vocab hidden") for name in ("embed", "head")}
    params |= {"factor": P("one"), "bias": P("vocab")}
    return fm.Model("TailedForCausalLM", config={}, params=params, forward=forward)


def plain(model, weights, batch):
    """The loss by definition: of the logits."""
    logits = model.forward(weights, batch["tokens"], batch["positions"], batch["segment_ids"])
    each = F.cross_entropy(
        logits.float().movedim(-1, 1), batch["tokens"].roll(-1, -1), reduction="none"
    )
    return each[batch["loss_mask"]].mean()


def batch_of(vocab, rows=2, length=12):
    documents = [torch.randint(0, vocab, (n,)) for n in [5, 6, 9, 3] * rows]
    return fm.pack(documents, length)


@pytest.mark.parametrize("name", TAILS)
def test_every_tail_counts(name):
    tail, is_cut = TAILS[name]
    model = model_of(tail)
    weights = weights_of(model)
    batch = batch_of(VOCAB // 2)
    with Largest() as largest:
        got = grad_and_value(lambda w: fm.loss(model, w, batch, chunk=4))(weights)
    want = grad_and_value(lambda w: plain(model, w, batch))(weights)
    torch.testing.assert_close(got, want)
    logits = batch["tokens"].numel() * VOCAB
    assert largest.numel < logits if is_cut else largest.numel >= logits // 2


def test_smoothing_and_z_loss_are_the_same_with_and_without_the_cut():
    cut, whole = (model_of(TAILS[name][0]) for name in ("nothing", "in place"))
    whole = model_of(lambda x, p: x + 0.0)
    weights, batch = weights_of(cut), batch_of(VOCAB)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01}
        torch.testing.assert_close(
            fm.loss(cut, weights, batch, **options), fm.loss(whole, weights, batch, **options)
        )


def test_a_llama_and_its_gradients():
    model = tiny(tie_word_embeddings=True)
    weights, batch = weights_of(model), batch_of(97)
    got = grad_and_value(lambda w: fm.loss(model, w, batch))(weights)
    want = grad_and_value(lambda w: plain(model, w, batch))(weights)
    torch.testing.assert_close(got, want)


def test_transforms_around_it():
    model = model_of(TAILS["a softcap"][0])
    weights, batch = weights_of(model), batch_of(VOCAB)
    tangents = fm.tree.map(torch.ones_like, weights)
    rows = {name: t[:, None] for name, t in batch.items()}

    def per_row(loss):
        return vmap(grad(loss), (None, 0))(weights, rows)

    got = per_row(lambda w, b: fm.loss(model, w, b))
    for i in range(len(batch["tokens"])):
        one = {name: t[i : i + 1] for name, t in batch.items()}
        want = grad(lambda w, one=one: plain(model, w, one))(weights)
        torch.testing.assert_close(fm.tree.map(lambda g, i=i: g[i], got), want)
    got = jvp(grad(lambda w: fm.loss(model, w, batch)), (weights,), (tangents,))
    want = jvp(grad(lambda w: plain(model, w, batch)), (weights,), (tangents,))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["nothing", "a softcap", "a bias"])
def test_compiled_whole(name):
    model = model_of(TAILS[name][0])
    weights, batch = weights_of(model), batch_of(VOCAB)

    def step(weights, batch):
        return grad_and_value(lambda w: fm.loss(model, w, batch))(weights)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(weights, batch), step(weights, batch))


def test_a_transform_inside_the_model_sees_logits():
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        return vmap(lambda x: ops.unembed(x, params["head"]))(x)

    model = fm.Model(
        "InsideForCausalLM", {}, {n: P("vocab hidden") for n in ("embed", "head")}, forward
    )
    weights, batch = weights_of(model), batch_of(VOCAB)
    torch.testing.assert_close(fm.loss(model, weights, batch), plain(model, weights, batch))


def test_nothing_is_put_off_outside():
    x, table = torch.randn(3, HIDDEN), torch.randn(VOCAB, HIDDEN)
    assert isinstance(ops.unembed(x, table), torch.Tensor)
    with deferring():
        put_off = ops.unembed(x, table)
        assert isinstance(put_off, Deferred)
        with pytest.raises(ShapeError, match="differ in their last dim"):
            ops.unembed(x, table.T)
    assert isinstance(ops.unembed(x, table), torch.Tensor)
    with pytest.raises(ZeroDivisionError), deferring():
        _ = 1 / 0
    assert isinstance(ops.unembed(x, table), torch.Tensor)
    torch.testing.assert_close(put_off.logits(), ops.unembed(x, table))


def test_a_batch_may_hold_less_than_a_pack():
    model = tiny()
    weights = weights_of(model)
    tokens = torch.randint(0, 97, (2, 8))
    got = fm.loss(model, weights, {"tokens": tokens})
    logits = model.forward(weights, tokens, torch.arange(8).expand(2, 8))
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(got, want)
    given = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    torch.testing.assert_close(fm.loss(model, weights, given), want)
    ids = torch.tensor([[0] * 3 + [1] * 5] * 2)
    by_ids = fm.loss(model, weights, {"tokens": tokens, "segment_ids": ids}, reduction="none")
    assert (by_ids == 0).nonzero().tolist() == [[0, 2], [0, 7], [1, 2], [1, 7]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_a_mask_of_any_dtype_says_what_counts(dtype):
    model, tokens = tiny(), torch.randint(0, 97, (2, 8))
    weights = weights_of(model)
    mask = torch.tensor([[1] * 3 + [0] * 5, [1] * 8]).to(dtype)  # its last token has no next one
    got = fm.loss(model, weights, {"tokens": tokens, "loss_mask": mask}, reduction="none")
    each = fm.loss(model, weights, {"tokens": tokens}, reduction="none")
    torch.testing.assert_close(got, each * mask)
    mean = fm.loss(model, weights, {"tokens": tokens, "loss_mask": mask})
    torch.testing.assert_close(mean, got.sum() / 10)
    if dtype != torch.bool:
        twice = fm.loss(model, weights, {"tokens": tokens, "loss_mask": 2 * mask})
        torch.testing.assert_close(twice, mean)


def test_what_is_no_batch_is_refused():
    model = tiny()
    tokens = torch.zeros(2, 8, dtype=torch.long)
    loss = functools.partial(fm.loss, model, weights_of(model))
    with pytest.raises(ShapeError, match="a batch has tokens"):
        loss({"tokens": tokens, "mask": tokens})
    with pytest.raises(ShapeError, match="loss_mask differs in shape"):
        loss({"tokens": tokens, "loss_mask": tokens[0]})
    pooled = fm.Model("E", {}, model.params, model.forward, task="embed", pooling="last")
    with pytest.raises(TaskError, match="no model to generate with"):
        fm.loss(pooled, weights_of(model), {"tokens": tokens})
