"""What `fm.fit` refuses before it trains, and what it must go on to take."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import funcmodels as fm
from funcmodels.errors import FuncModelsError, ShapeError, ShardingError, TrainingError
from tests.tiny_llama import tiny

MODEL = tiny(vocab_size=16, num_hidden_layers=1)
BATCH = fm.pack([torch.arange(12)], 12)
LR = torch.nn.Parameter(torch.zeros(1))


def fit(model: Any = MODEL, weights: Any = None, data: Any = (BATCH,), **settings: Any) -> Any:
    weights = fm.init(MODEL, seed=0) if weights is None else weights
    settings = {"optimizer": fm.optim.sgd(0.1), "steps": 1, "progress": False, **settings}
    return fm.fit(model, weights, data, **settings)


def without(path: str, **put: Any) -> Any:
    """Weights but those of one name, and something else beside them."""
    weights = fm.init(MODEL, seed=0)
    return {**{name: w for name, w in weights.items() if name != path}, **put}


def given(**settings: Any) -> Callable[[], Any]:
    return lambda: fit(**settings)


def on_mesh(mesh: Any) -> Callable[[], Any]:
    return lambda: fm.compile_to_torch(MODEL, mesh)


def on_meta() -> Any:
    module = fm.compile_to_torch(MODEL)
    return fit(module, module.weights())


def of_another_module() -> Any:
    return fit(fm.compile_to_torch(MODEL), fm.init(tiny(vocab_size=8, num_hidden_layers=1), seed=0))


OWN_LOSS = {"loss": lambda model, weights, batch: weights["w"].square().sum()}
NORM = torch.ones(32)

# What is done, the error, and what it says: first line, got, need and fix.
REFUSED: dict[str, tuple[Callable[[], Any], type[FuncModelsError], str]] = {
    "no steps": (
        given(steps=0), TrainingError, r"steps is no number[^~]*got: +steps=0[^~]*fix: +steps=1$",
    ),
    "a float of steps": (
        given(steps=1e3), TrainingError, r"steps=1000.0\n +need: an int[^~]*fix: +steps=1000$",
    ),
    "a nan of steps": (given(steps=float("nan")), TrainingError, r"steps=nan[^~]*fix: +steps=1$"),
    "True steps": (given(steps=True), TrainingError, r"steps=True[^~]*fix: +steps=1$"),
    "no microbatches": (
        given(microbatches=0), TrainingError, r"no number of parts[^~]*fix: +microbatches=1$",
    ),
    "save_every": (given(save_every=0), TrainingError, r"save_every=0[^~]*fix: +save_every=1$"),
    "evaluate_every": (
        given(evaluate_every=-5), TrainingError, r"evaluate_every=-5[^~]*fix: +evaluate_every=1$",
    ),
    "clip below zero": (
        given(clip=-1), TrainingError, r"got: +clip=-1\n +need: clip > 0[^~]*clip=None to leave",
    ),
    "clip of zero": (given(clip=0.0), TrainingError, r"got: +clip=0.0\n"),
    "clip that is no number": (given(clip=float("nan")), TrainingError, r"got: +clip=nan\n"),
    "torch.optim's class": (
        given(optimizer=torch.optim.AdamW), TrainingError,
        r"torch.optim's AdamW, the class[^~]*optimizer=fm.optim.adamw\(0.0003\)",
    ),
    "torch.optim's instance": (
        given(optimizer=torch.optim.SGD([LR], lr=0.25)), TrainingError,
        r"torch.optim's SGD, an instance[^~]*optimizer=fm.optim.sgd\(0.25\)",
    ),
    "another of torch.optim": (
        given(optimizer=torch.optim.Rprop([LR], lr=0.5)), TrainingError,
        r"torch.optim's Rprop[^~]*optimizer=fm.optim.adamw\(0.5\)",
    ),
    "an optimizer not called": (
        given(optimizer=fm.optim.lion), TrainingError,
        r"no init and update[^~]*got: +lion, of type function[^~]*fm.optim.lion\(3e-4\)",
    ),
    "a rate": (given(optimizer=3e-4), TrainingError, r"got: +float[^~]*fm.optim.adamw\(3e-4\)"),
    "a leaf is missing": (
        given(weights=without("norm")), TrainingError,
        r"not the parameters of \w+[^~]*none unknown[^~]*norm missing[^~]*fm.init\(model, seed=0\)",
    ),
    "a leaf of another name": (
        given(weights=without("norm", nrm=NORM)), TrainingError,
        r"nrm unknown[^~]*norm missing[^~]*fix: +nrm is perhaps norm$",
    ),
    "a leaf too many": (
        given(weights=without("", bias=NORM)), TrainingError, r"bias unknown[^~]*leave out bias",
    ),
    "a flat dict": (
        given(weights=OrderedDict(fm.tree.items(fm.init(MODEL, seed=0)))), TrainingError,
        r"a flat dict[^~]*layers.0.[^~]*fm.tree.unflatten\(model.params, weights\)",
    ),
    "a leaf of another shape": (
        given(weights=without("", norm=torch.ones(31))), ShapeError,
        r"got: +norm \(31,\)\n +need: norm \(32,\)\n +fix: +weights = fm.init",
    ),
    "weights of another model": (
        of_another_module, ShapeError,
        r"got: +embed \(8, 32\)[^~]*need: embed \(16, 32\)[^~]*module.load\(weights\).weights\(\)",
    ),
    "a leaf that is no tensor": (
        given(weights=without("", norm=None)), TrainingError,
        r"no tree of tensors[^~]*got: +norm: None",
    ),
    "no weights": (given(weights={}, **OWN_LOSS), TrainingError, r"got: +no tensors"),
    "weights on meta": (
        on_meta, TrainingError, r"on the meta device[^~]*embed[^~]*module.reset\(seed=0\) first",
    ),
    "on meta, with a loss of its own": (
        given(weights={"w": torch.empty(1, device="meta")}, **OWN_LOSS), TrainingError,
        r"on the meta device[^~]*got: +w\n[^~]*fm.init\(model, seed=0\)",
    ),
    "data that is a batch": (
        given(data=BATCH), TrainingError,
        r"no iterable of batches[^~]*a dict with tokens, positions[^~]*data=\[batch\]",
    ),
    "data that is a tensor": (
        given(data=BATCH["tokens"]), TrainingError,
        r"a tensor \(1, 12\)[^~]*data=\[{\"tokens\": tokens}\]",
    ),
    "data that is no iterable": (given(data=7), TrainingError, r"got: +a value of type int"),
    "a batch that is a tensor": (
        given(data=[BATCH["tokens"]]), TrainingError,
        r"batch 0 of the data[^~]*a tensor \(1, 12\)[^~]*fix: +{\"tokens\": batch}",
    ),
    "a batch that is a pair": (
        given(data=[(BATCH["tokens"], 1)]), TrainingError, r"a value of type tuple[^~]*fm.pack",
    ),
    "the second batch": (
        given(data=lambda n: [BATCH, None][n], steps=2), TrainingError, r"batch 1[^~]*got: +None\n",
    ),
    "a batch of transformers": (
        given(data=[{"input_ids": BATCH["tokens"], "labels": BATCH["tokens"]}]), TrainingError,
        r"got: +input_ids, labels[^~]*{\"tokens\": batch\[\"input_ids\"\]}",
    ),
    "tokens in a list": (
        given(data=[{"tokens": [[1, 2]]}]), TrainingError, r"got: +tokens: a value of type list",
    ),
    "evaluate that is a number": (
        given(evaluate=0.5), TrainingError, r"evaluate is no function[^~]*evaluate=float",
    ),
    "evaluate that returns a number": (
        given(evaluate=lambda weights: 0.5), TrainingError,
        r"evaluate returned no mapping[^~]*of type float[^~]*return {\"loss\": value}",
    ),
    "evaluate that returns nothing": (
        given(evaluate=lambda weights: None), TrainingError, r"evaluate returned[^~]*got: +None\n",
    ),
    "evaluate that returns a number for each token": (
        given(evaluate=lambda weights: {"loss": torch.ones(3)}), TrainingError,
        r"no number for loss[^~]*got: +loss: a tensor \(3,\)[^~]*fix: +loss.mean\(\)$",
    ),
    "evaluate that returns a word": (
        given(evaluate=lambda weights: {"loss": 1.0, "best": "yes"}), TrainingError,
        r"no number for best[^~]*of type str[^~]*fix: +leave out best$",
    ),
    "evaluate of nothing": (
        given(evaluate=lambda: {"loss": 1.0}), TrainingError,
        r"evaluate takes other arguments[^~]*too many[^~]*\(weights\)[^~]*evaluate=lambda weights:",
    ),
    "a loss without the model": (
        given(loss=lambda weights, batch: weights["norm"].sum()), TrainingError,
        r"<lambda>\(weights, batch\): too many[^~]*fix: +loss=lambda model, weights, batch: ...$",
    ),
    "a dtype's name": (
        given(dtype="float16"), TrainingError, r"dtype='float16'[^~]*fix: +dtype=torch.float16$",
    ),
    "a dtype of integers": (
        given(dtype=torch.int8), TrainingError, r"=torch.int8\n[^~]*fix: +dtype=torch.bfloat16$",
    ),
    "matrices of weights": (
        lambda: fm.optim.matrices(fm.init(MODEL, seed=0)), TrainingError,  # type: ignore[arg-type]
        r"matrices[^~]*got: +a dict[^~]*fix: +fm.optim.matrices\(model\)$",
    ),
    "matrices of a module": (
        lambda: fm.optim.matrices(fm.compile_to_torch(MODEL)), TrainingError,  # type: ignore[arg-type]
        r"got: +a CompiledModel[^~]*fix: +fm.optim.matrices\(module.model\)$",
    ),
    "a dict for a mesh": (
        on_mesh({"tp": 2}), ShardingError,
        r"no DeviceMesh[^~]*mesh={'tp': 2}[^~]*device, \(2,\), mesh_dim_names=\('tp',\)\)",
    ),
    "a number for a mesh": (
        on_mesh(4), ShardingError,
        r"got: +mesh=4[^~]*device, \(4,\), mesh_dim_names=\('dp',\)\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str):
    call, error, said = REFUSED[case]
    with pytest.raises(error, match=said) as raised:
        call()
    assert all(raised.value.lines[line] for line in ("got", "need", "fix"))


def test_nothing_is_trained_before_it_is_refused():
    """Also not in the memory of the weights, where they are donated."""
    weights = fm.init(MODEL, seed=0)
    with pytest.raises(TrainingError, match="clip=-1"):
        fit(weights=weights, clip=-1, donate=True, data=lambda n: pytest.fail("data was read"))
    torch.testing.assert_close(weights, fm.init(MODEL, seed=0), rtol=0, atol=0)


class Rows(torch.utils.data.Dataset):
    """Read by number alone, as torch's data sets are."""

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if number > 1:
            raise IndexError
        return {name: value[0] for name, value in BATCH.items()}

    def __len__(self) -> int:
        return 2


def own_optimizer() -> Any:
    """What `fm.optim.sgd(0.1)` does, from a class that is no `fm.optim.Optimizer`."""

    class Own:
        elementwise = True

        def init(self, weights: Any) -> Any:
            return {}

        def update(self, grads: Any, state: Any, weights: Any, *, donate: bool = False) -> Any:
            return fm.tree.map(lambda w, g: w - 0.1 * g, weights, grads), state

    return Own()


TAKEN: dict[str, dict[str, Any]] = {
    "an int to clip to": {"clip": 100},
    "no bound to clip to": {"clip": float("inf")},
    "a data set": {"data": Rows()},
    "a loader": {"data": torch.utils.data.DataLoader(Rows(), batch_size=1)},
    "a function": {"data": lambda number: BATCH},
    "an optimiser of one's own": {"optimizer": own_optimizer()},
    "another mapping": {"evaluate": lambda weights: OrderedDict(loss=1.0)},
    "a tensor evaluated": {"evaluate": lambda weights: {"loss": weights["norm"].sum()}},
    "a loss with more": {"loss": lambda *args, **options: fm.loss(*args, **options)},
    "a part of a function": {"loss": partial(fm.loss, chunk=4)},
    "nothing evaluated": {"evaluate": lambda weights: {}},
}


@pytest.mark.parametrize("case", TAKEN)
def test_taken(case: str):
    """Each makes the same two steps down the gradient."""
    assert fit(steps=2, **TAKEN[case]).losses == pytest.approx(fit(steps=2).losses)


def test_a_loss_of_ones_own_may_take_any_tree_and_any_batch():
    fitted = fit(weights={"w": torch.ones(2)}, data=[torch.ones(3), None], steps=2, **OWN_LOSS)
    assert fitted.losses == pytest.approx([2.0, 1.28])


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_the_fix_for_an_optimiser_of_torch_is_that_optimiser(name: str):
    """What the message says to write makes the step that torch's makes."""
    weight, grad = torch.nn.Parameter(torch.ones(3)), torch.tensor([1.0, -2.0, 3.0])
    theirs = getattr(torch.optim, name)([weight], lr=0.125)
    with pytest.raises(TrainingError) as raised:
        fit(optimizer=theirs)
    fix = str(raised.value.lines["fix"]).removeprefix("optimizer=")
    ours = eval(fix, {"fm": fm})
    start = {"w": torch.ones(3)}
    found, _ = ours.update({"w": grad}, ours.init(start), start)
    weight.grad = grad
    theirs.step()
    torch.testing.assert_close(found["w"], weight.detach())
