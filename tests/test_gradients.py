"""`fm.grad_and_value`, `fm.accumulate` and `fm.cast`."""

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcmodels as fm
from funcmodels.errors import ShapeError
from tests.ops.test_loss import Largest
from tests.test_loss import batch_of
from tests.tiny_llama import tiny, weights_of


def small():
    model = tiny()
    return model, weights_of(model), batch_of(97, rows=4)


def test_gradients_are_torch_funcs():
    model, weights, batch = small()

    def loss(w, b, scale=1.0):
        return scale * fm.loss(model, w, b)

    def with_aux(w, b):
        return loss(w, b), {"weights": w, "name": "loss"}

    ours, func = fm.grad_and_value, torch.func.grad_and_value
    torch.testing.assert_close(ours(loss)(weights, batch), func(loss)(weights, batch))
    torch.testing.assert_close(
        ours(loss)(weights, batch, scale=2.0), func(loss)(weights, batch, scale=2.0)
    )
    got = ours(with_aux, has_aux=True)(weights, batch)
    torch.testing.assert_close(got[0], func(loss)(weights, batch)[0])
    assert not any(t.requires_grad for t in fm.tree.leaves(got) if isinstance(t, torch.Tensor))
    both = ours(lambda a, b, c: (a["x"] * b).sum(), (0, 1))({"x": torch.ones(2)}, torch.ones(2), 3)
    assert both[0][0]["x"].tolist() == both[0][1].tolist() == [1.0, 1.0]
    unused = ours(lambda w: w["a"].sum())({"a": torch.ones(2), "b": torch.ones(3)})[0]
    assert unused["b"].tolist() == [0.0] * 3
    with torch.no_grad():
        assert ours(lambda w: w * w)(torch.tensor(3.0))[0] == 6
    with pytest.raises(ShapeError, match="a gradient is of one number"):
        ours(lambda w: w)(torch.ones(2))


def test_gradients_inside_transforms_and_of_what_requires_a_gradient():
    x = torch.randn(3, 4).double()

    def inner(x):
        return fm.grad_and_value(lambda x: x.sin().square().sum())(x)[0]

    def want(x):
        return grad(lambda x: x.sin().square().sum())(x)

    torch.testing.assert_close(vmap(inner)(x), want(x))
    torch.testing.assert_close(grad(lambda x: inner(x).sum())(x), grad(lambda x: want(x).sum())(x))
    torch.testing.assert_close(jvp(inner, (x,), (x,)), jvp(want, (x,), (x,)))
    leaf = x.clone().requires_grad_()
    found = torch.autograd.grad(inner(leaf).sum(), leaf)[0]
    torch.testing.assert_close(found, grad(lambda x: want(x).sum())(x))
    compiled = torch.compile(inner, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want(x))


@pytest.mark.parametrize(
    ("parts", "how"),
    [
        (1, "plain"),
        (2, "plain"),
        (4, "plain"),
        pytest.param(2, "compiled", marks=pytest.mark.slow),
    ],
)
def test_accumulated_gradients_are_the_whole_batchs(parts, how):
    model, weights, batch = small()
    rows = batch["tokens"].shape[0]
    batch = {name: t[: rows - rows % 4] for name, t in batch.items()}
    batch["loss_mask"][0, 3:] = False  # as many rows, not as many tokens
    batch["loss_mask"][1] = True  # the last of which has none after it, and so no loss
    counts = [int(m[:-1].sum()) for m in batch["loss_mask"]]
    assert len(set(counts)) > 1

    def loss(w, b):
        return fm.loss(model, w, b)

    step = fm.accumulate(loss, parts)
    if how == "compiled":
        step = torch.compile(step, backend="aot_eager", fullgraph=True)
    got = step(weights, batch)
    torch.testing.assert_close(got, fm.grad_and_value(loss)(weights, batch))


def test_accumulation_of_rows_and_of_counts_of_ones_own():
    x, w = torch.randn(6, 3).double(), torch.randn(3).double()

    def mean(w, x):
        return (x @ w).square().mean()

    want = fm.grad_and_value(mean)(w, x)
    torch.testing.assert_close(fm.accumulate(mean, 3)(w, x), want)
    uneven = fm.accumulate(mean, 2, count=lambda x: 1.0 if x[0, 0] == x[0, 0] else 0.0)
    torch.testing.assert_close(uneven(w, x), want)
    per_row = vmap(fm.accumulate(mean, 2), (None, 0))(w, torch.stack([x, 2 * x]))
    torch.testing.assert_close(per_row[0][0], want[0])
    with Largest() as largest:
        fm.accumulate(lambda w, x: (x @ w.expand(100, 3).T).mean(), 6)(w, x)
    assert largest.numel < 600
    with pytest.raises(ShapeError, match=r"microbatches in \{1, 2, 3, 6\}"):
        fm.accumulate(mean, 4)(w, x)


def test_gradients_of_bfloat16_are_summed_in_float32():
    w, x = torch.zeros(1).bfloat16(), torch.full((512, 1), 1.0).bfloat16()
    x[0] = 257.0  # summed in bfloat16, it would stay alone: 0.5 + 1 / 512 is 0.5
    got, _ = fm.accumulate(lambda w, x: (w * x).sum(), 512, count=lambda _: 512.0)(w, x)
    assert got.dtype == torch.bfloat16
    assert got == torch.tensor((256 + 511) / 512).bfloat16()  # 257 is rounded when it is made


def test_float32_masters_and_bfloat16_compute():
    P = fm.axes(a=4, b=4)
    params = {"w": P("a b"), "gate": P("a b", dtype=torch.float32), "ids": P("a")}

    def forward(params, tokens, positions, segment_ids=None):
        return params["w"]

    model = fm.Model("M", {}, params, forward)
    weights = {name: torch.randn(4, 4) for name in ("w", "gate")} | {"ids": torch.arange(4)}
    low = fm.cast(model, weights, torch.bfloat16)
    assert {n: t.dtype for n, t in low.items()} == {
        "w": torch.bfloat16,
        "gate": torch.float32,
        "ids": torch.int64,
    }
    assert low["gate"] is weights["gate"]

    model, weights, batch = small()

    def loss(w, b):
        return fm.loss(model, fm.cast(model, w, torch.bfloat16), b)

    grads, value = fm.grad_and_value(loss)(weights, batch)
    assert {g.dtype for g in fm.tree.leaves(grads)} == {torch.float32}
    by_low, same = fm.grad_and_value(lambda w, b: fm.loss(model, w, b))(
        fm.cast(model, weights, torch.bfloat16), batch
    )
    assert value == same
    torch.testing.assert_close(grads, fm.tree.map(torch.Tensor.float, by_low))
