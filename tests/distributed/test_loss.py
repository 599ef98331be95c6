"""`CompiledModel.loss` on meshes: `fm.loss` of all rows on one process, and no logits gathered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funcmodels as fm
from funcmodels.errors import ShapeError
from tests.distributed.ranks import DEVICE, on_one, on_ranks
from tests.distributed.training import loaded, own_rows
from tests.ops.test_loss import Largest
from tests.tiny_llama import tiny, weights_of

VOCAB, LENGTH, CHUNK = 1024, 64, 4
OPTIONS: dict[str, Any] = {"chunk": CHUNK, "label_smoothing": 0.1, "z_loss": 0.01}
MESHES: dict[str, tuple[dict[str, int] | None, dict[str, Any]]] = {
    "one process": (None, {}),
    "dp2": ({"dp": 2}, {}),
    "tp2": ({"tp": 2}, {}),
    "tp2, sequence parallel": ({"tp": 2}, {"sequence_parallel": True}),
    "fsdp2": ({"fsdp": 2}, {}),
}


def model() -> fm.Model:
    return tiny(vocab_size=VOCAB, tie_word_embeddings=True)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [36, 28, 64, 16, 20, 48]  # with padding
    rows = fm.pack([torch.randint(0, VOCAB, (n,), generator=generator) for n in sizes], LENGTH)
    return {name: x.to(DEVICE) for name, x in rows.items()}


def loss_and_gradients(name: str) -> tuple[Any, Any, int]:
    """Whole gradients, the loss, and the elements of the largest tensor of a step."""
    mesh, options = MESHES[name]
    made = loaded(model(), mesh, **options)
    rows = batch()
    own = dict(zip(rows, own_rows(made, *rows.values()), strict=True))
    weights = fm.tree.map(lambda p: p.detach(), made.weights())

    def step():
        return torch.func.grad_and_value(lambda w: made.loss(w, own, **OPTIONS))(weights)

    step()  # which traces
    with Largest() as largest:
        grads, value = step()
    return made.whole(grads), value, largest.numel


def on_all(names: list[str]) -> dict[str, Any]:
    return {name: loss_and_gradients(name) for name in names}


@pytest.fixture(scope="module")
def on_two() -> list[Any]:
    return on_ranks(2, on_all, [name for name in MESHES if name != "one process"])


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_the_loss_of_all_rows(name: str, on_two: list[Any]):
    rows, whole = batch(), model()
    assert rows["tokens"].shape == (4, LENGTH)
    want = torch.func.grad_and_value(lambda w: fm.loss(whole, w, rows, **OPTIONS))
    found = [on_one(on_all, [name])] if MESHES[name][0] is None else on_two
    weights = fm.tree.map(lambda w: w.to(DEVICE), weights_of(whole))
    expected = on_one(want, weights)
    for rank in found:
        grads, value, largest = rank[name]
        torch.testing.assert_close(value, expected[1])
        torch.testing.assert_close(grads, expected[0], rtol=1e-5, atol=1e-5)
        # What a rank of two would have of the logits; all else, gradients in one bucket, is less.
        assert largest < rows["tokens"].numel() * VOCAB // 2


def test_targets_of_ones_own_are_refused():
    made = fm.compile_to_torch(model())
    made.load(weights_of(made.model))
    rows = {name: x.cpu() for name, x in batch().items()}
    with pytest.raises(ShapeError, match="a token's target is the token after it"):
        made.loss(made.weights(), {**rows, "targets": rows["tokens"]})
