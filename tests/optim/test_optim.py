"""Optimisers under torch.func, torch.compile, on meta, in other dtypes; their parts; refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import funcmodels as fm
from funcmodels.optim.muon import newton_schulz
from tests.optim.test_against_torch import assert_same, tensors
from tests.tiny_llama import tiny

optim = fm.optim
MATRICES = {"a": "rows columns -> rows columns", "b.1": "r c -> r c", "c": "r c -> r c"}
# float64, in which the rule and the kernel of a right formula agree to many digits.
EVERY = {
    "adamw": optim.adamw(optim.cosine(0.03, total=9, warmup=2), weight_decay=0.1),
    "sgd": optim.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "lion": optim.lion(0.01, weight_decay=0.1),
    "muon": optim.muon(0.01, MATRICES, rest=optim.adamw(0.03)),
    "chain": optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(0.03)),
}


def steps(optimizer: optim.Optimizer, update: Any, dtype: torch.dtype = torch.float64) -> Any:
    weights = tensors(0, dtype)
    state = optimizer.init(weights)
    for step in range(4):
        weights, state = update(tensors(2 * step + 1, dtype), state, weights)
    return weights, state


@pytest.mark.parametrize("name", EVERY)
def test_rule_equals_kernel(name):
    """Under torch.func the formula runs, elsewhere torch's kernel."""
    optimizer = EVERY[name]

    def through_func(grads: Any, state: Any, weights: Any) -> Any:
        def scalar(w: Any) -> Any:
            new = optimizer.update(grads, state, w)
            return fm.tree.leaves(new[0])[0].sum(), new

        return torch.func.grad(scalar, has_aux=True)(weights)[1]

    # bfloat16 inside Muon: a rounding of a step may fall the other way.
    close = {"atol": 1e-3, "rtol": 1e-2} if name == "muon" else {"atol": 1e-7, "rtol": 1e-7}
    by_rule, by_kernel = steps(optimizer, through_func), steps(optimizer, optimizer.update)
    fm.tree.map(lambda a, b: torch.testing.assert_close(a, b, **close), by_rule, by_kernel)


@pytest.mark.parametrize("name", EVERY)
def test_pure_and_donated_are_the_same_bits(name):
    optimizer = EVERY[name]
    weights, state = tensors(0), optimizer.init(tensors(0))
    first, second = optimizer.update(tensors(1), state, weights)
    assert_same(weights, tensors(0))  # nothing was written
    assert_same(state, optimizer.init(tensors(0)))
    own = {path: leaf.data_ptr() for path, leaf in fm.tree.items((weights, state))}
    donated = optimizer.update(tensors(1), state, weights, donate=True)
    assert_same(donated, (first, second))
    for path, leaf in fm.tree.items(donated):
        assert leaf.data_ptr() == own[path] or path.endswith("step")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "donate"), [("adamw", False), *((name, True) for name in EVERY)])
def test_compiled(name, donate):
    """One graph, compiled once although the rate changes, and memory is kept when donated."""
    optimizer = EVERY[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if name == "adamw" and donate else "aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def update(grads: Any, state: Any, weights: Any) -> Any:
        return optimizer.update(grads, state, weights, donate=donate)

    weights = fm.tree.map(Tensor.contiguous, tensors(0))
    state = optimizer.init(weights)
    own = [w.data_ptr() for w in fm.tree.leaves(weights)]
    for step in range(4):
        weights, state = update(tensors(2 * step + 1), state, weights)
    assert counter.frame_count == 1
    assert ([w.data_ptr() for w in fm.tree.leaves(weights)] == own) is donate
    expected = steps(optimizer, optimizer.update, torch.float32)
    close = {"atol": 1e-2, "rtol": 1e-2} if name == "muon" else {"atol": 1e-5, "rtol": 1e-4}
    fm.tree.map(lambda a, b: torch.testing.assert_close(a, b, **close), (weights, state), expected)


@pytest.mark.parametrize("name", EVERY)
def test_on_meta(name):
    """Shapes and dtypes without memory, as a planner of memory wants them."""
    meta = fm.tree.map(lambda w: w.to("meta"), tensors(0, torch.bfloat16))
    weights, state = EVERY[name].update(meta, EVERY[name].init(meta), meta)
    real = EVERY[name].update(
        tensors(1, torch.bfloat16), EVERY[name].init(tensors(0, torch.bfloat16)),
        tensors(0, torch.bfloat16),
    )  # fmt: skip
    for (path, a), b in zip(fm.tree.items((weights, state)), fm.tree.leaves(real), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert a.device.type == "meta" or path.endswith("step")


def test_a_step_has_a_derivative():
    """By the learning rate's effect on the next loss, against finite differences."""
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def after(scale: Tensor) -> Tensor:
        optimizer, weights = optim.adamw(0.1, weight_decay=0.0), {"w": start * scale}
        state = optimizer.init(weights)
        for _ in range(2):
            weights, state = optimizer.update({"w": weights["w"] ** 3}, state, weights)
        return weights["w"].square().sum()

    one, h = torch.ones((), dtype=torch.float64), 1e-6
    slope = (after(one + h) - after(one - h)) / (2 * h)
    assert torch.func.grad(after)(one) == pytest.approx(float(slope), rel=1e-6)


def test_vmap_trains_many_at_once():
    optimizer = EVERY["adamw"]
    many = torch.stack([torch.ones(3), 2 * torch.ones(3)])

    def one(w: Tensor) -> Tensor:
        return optimizer.update({"w": w.exp()}, optimizer.init({"w": w}), {"w": w})[0]["w"]

    torch.testing.assert_close(torch.vmap(one)(many), torch.stack([one(w) for w in many]))


def test_lion_by_its_closed_form():
    optimizer = optim.lion(0.01, betas=(0.9, 0.99), weight_decay=0.1)
    weights, m = tensors(0, torch.float64), fm.tree.map(torch.zeros_like, tensors(0, torch.float64))
    for step in range(4):
        g = tensors(2 * step + 1, torch.float64)
        sign = fm.tree.map(lambda m, g: torch.sign(0.9 * m + 0.1 * g), m, g)
        weights = fm.tree.map(lambda w, s: w - 0.01 * (s + 0.1 * w), weights, sign)
        m = fm.tree.map(lambda m, g: 0.99 * m + 0.01 * g, m, g)
    got, state = steps(optimizer, optimizer.update)
    fm.tree.map(torch.testing.assert_close, got, weights)
    fm.tree.map(torch.testing.assert_close, state["m"], m)


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (3, 24, 16)])
def test_newton_schulz(shape):
    """Its singular values are near one; its singular vectors are those of the matrix."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(x).float())
    assert values.min() > 0.5
    assert values.max() < 1.35
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    alignment = (u.mT @ newton_schulz(x).float() @ vh.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(alignment.sort().values, values.sort().values, atol=0.03, rtol=0.05)
    many = newton_schulz(x).reshape(-1, *shape[-2:])
    for one, of_many in zip(x.reshape(-1, *shape[-2:]), many, strict=True):
        torch.testing.assert_close(newton_schulz(one), of_many, atol=0.02, rtol=0.02)


def test_muon_sees_the_matrices_of_the_checkpoint():
    """Heads are one side of a matrix, whatever dims the parameter has; embeddings stay out."""
    model = tiny()
    matrices = optim.matrices(model)
    assert matrices["layers.0.attn.q"] == "heads head_dim hidden -> (heads head_dim) hidden"
    assert {path.split(".")[0] for path in matrices} == {"layers"}
    assert not any("norm" in path for path in matrices)
    weights = fm.init(model, seed=0)
    optimizer = optim.muon(0.1, matrices, rest=optim.frozen(), weight_decay=0.0)
    new, _ = optimizer.update(weights, optimizer.init(weights), weights)
    q, moved = weights["layers"][0]["attn"]["q"], new["layers"][0]["attn"]["q"]
    expected = newton_schulz(q.flatten(0, 1)).float()
    torch.testing.assert_close((q - moved).flatten(0, 1) / 0.1, expected, atol=0.02, rtol=0.02)
    assert torch.equal(new["embed"], weights["embed"])


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_state_dtype(name):
    """A float32 state of bfloat16 weights loses nothing that the kernel had computed."""
    settings = {"lr": 0.03, "weight_decay": 0.1, "state_dtype": torch.float32}
    settings |= {"momentum": 0.9} if name == "sgd" else {}
    optimizer = getattr(optim, name)(**settings)
    weights = tensors(0, torch.bfloat16)
    new, state = optimizer.update(tensors(1, torch.bfloat16), optimizer.init(weights), weights)
    wide = fm.tree.map(Tensor.float, (tensors(1, torch.bfloat16), weights))
    expected, wide_state = optimizer.update(wide[0], optimizer.init(wide[1]), wide[1])
    assert_same(new, fm.tree.map(lambda w: w.bfloat16(), expected))
    assert_same(state, wide_state)
    assert fm.tree.leaves(state["m"])[0].dtype == torch.float32


def test_decay_by_path():
    optimizer = optim.adamw(0.1, weight_decay=0.5, decay=optim.not_matching("b.*"))
    weights, zeros = tensors(0), fm.tree.map(torch.zeros_like, tensors(0))
    new, _ = optimizer.update(zeros, optimizer.init(weights), weights)
    assert_same(new["b"], weights["b"])
    torch.testing.assert_close(new["a"], weights["a"] * (1 - 0.1 * 0.5))


def test_partition():
    optimizer = optim.partition({"b.*": optim.frozen(), "a": optim.sgd(1.0), "*": optim.sgd(0.0)})
    weights, grads = tensors(0), tensors(1)
    state = optimizer.init(weights)
    new, state = optimizer.update(grads, state, weights)
    assert_same(new, {"a": weights["a"] - grads["a"], "b": weights["b"], "c": weights["c"]})
    assert [dict(fm.tree.items(s)) for s in state] == [{}, {"step": 1}, {"step": 1}]
    with pytest.raises(fm.errors.TrainingError, match=r"no optimiser for c.*\n.*there are a, b"):
        optim.partition({"a": optim.frozen(), "b.*": optim.frozen()}).init(weights)


NETWORK = {"embed": torch.ones(2), "layers": [{"norm": torch.ones(2), "up": torch.ones(2, 2)}]}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: optim.adamw(0.1, decay=optim.matching("*nrom*")),
         r"optim\.matching: no parameter matches[^~]*got:  '\*nrom\*'[^~]*fix:  '\*norm\*'"),
        (lambda: optim.lion(0.1, weight_decay=0.1, decay=optim.not_matching("layer.*.nom")),
         r"optim\.not_matching: no[^~]*paths as embed, layers\.0\.norm, layers\.0\.up"),
        (lambda: optim.partition({"emed": optim.frozen(), "*": optim.sgd(0.1)}),
         r"optim\.partition: no parameter matches[^~]*'emed'[^~]*fix:  'embed'"),
        (lambda: optim.partition({"layers.*": optim.sgd(0.1), "*norm": optim.frozen(),
                                  "*": optim.sgd(0.1)}),
         r"patterns before '\*norm' match all[^~]*got:  layers\.0\.norm"),
        (lambda: optim.partition({"embed": optim.sgd(0.1), "*": optim.chain(
            optim.clip_by_global_norm(1.0), optim.adamw(0.1, decay=optim.matching("emb")))}),
         r"fix:  'embed'"),
        (lambda: optim.adamw(0.1, decay="*norm*"),
         r"decay is no mask[^~]*'\*norm\*'[^~]*fix:  decay=fm\.optim\.matching\('\*norm\*'\)"),
        (lambda: optim.adamw(0.1, decay={"embed": True}), r"decay is no mask[^~]*got:  dict"),
    ],
)  # fmt: skip
def test_what_would_do_nothing_is_refused(made, said):
    with pytest.raises(fm.errors.TrainingError, match=said):
        made().init(NETWORK)


def test_masks_that_say_something_are_taken():
    """One of several patterns is enough; and in a part, so is a parameter of another part."""
    bare = optim.not_matching("*norm*", "*bias*")
    optim.adamw(0.1, decay=bare).init(NETWORK)
    optim.adamw(0.1, weight_decay=0.0, decay=optim.matching("nothing")).init(NETWORK)
    optim.partition({"*norm": optim.sgd(0.1), "*": optim.adamw(0.1, decay=bare)}).init(NETWORK)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (optim.constant(2.0, warmup=4), {0: 0.5, 3: 2.0, 100: 2.0}),
        (optim.linear(2.0, total=10, warmup=2, final=1.0),
         {0: 1.0, 1: 2.0, 6: 1.5, 10: 1.0, 99: 1.0}),
        (optim.cosine(2.0, total=12, warmup=2, final=1.0),
         {0: 1.0, 2: 2.0, 7: 1.5, 4: 1.5 + 0.5 * math.cos(0.2 * math.pi), 12: 1.0, 99: 1.0}),
        (optim.wsd(2.0, total=20, warmup=2, decay=10), {0: 1.0, 2: 2.0, 10: 2.0, 15: 1.0, 20: 0.0}),
    ],
)  # fmt: skip
def test_schedules(schedule, values):
    for step, value in values.items():
        assert float(schedule(torch.tensor(step))) == pytest.approx(value, abs=1e-15)


def test_refusals():
    optimizer, weights = optim.adamw(0.1), tensors(0)
    state = optimizer.init(weights)
    with pytest.raises(fm.errors.TrainingError, match=r"gradients and.*\n.*differ: c\n"):
        optimizer.update({"a": weights["a"], "b": weights["b"]}, state, weights)
    with pytest.raises(fm.errors.TrainingError, match=r'state\["m"\] and the weights'):
        optimizer.update(weights, optimizer.init({"a": weights["a"]}), weights)
    with pytest.raises(fm.errors.TrainingError, match=r"gradient of c does not fit.*\n.*None"):
        optimizer.update({**weights, "c": None}, state, weights)
    with pytest.raises(fm.errors.TrainingError, match="needs a momentum"):
        optim.sgd(0.1, nesterov=True)
    with pytest.raises(fm.errors.TrainingError, match=r"b\.0 is not made a matrix"):
        optim.muon(0.1, {"b.0": "h d -> (h d)"}, rest=optimizer)
