"""What torch.func and torch.compile make of a model on a mesh equals what they make of it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import funcmodels as fm
from tests import tiny_llama
from tests.distributed.ranks import on_one, on_ranks
from tests.distributed.training import VOCAB, batch, loaded, loss_on, own_rows

MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp2": ({"dp": 2}, {}),
    "fsdp2": ({"fsdp": 2}, {}),
    "tp2, sequence parallel": ({"tp": 2}, {"sequence_parallel": True}),
}
KINDS = ("forward", "forward over reverse", "reverse over reverse", "autograd twice", "compiled")


def derivatives(mesh: dict[str, int] | None, **options: Any) -> dict[str, Any]:
    """Derivatives of the loss of a model of one layer, of several orders and in several ways."""
    model = tiny_llama.tiny(vocab_size=VOCAB, num_hidden_layers=1)
    module = loaded(model, mesh, **options)
    weights = fm.tree.map(lambda p: p.detach(), module.weights())
    along = fm.tree.map(lambda x: torch.full_like(x, 0.1), weights)
    rows = own_rows(module, *batch(0))

    def loss(w: Any) -> torch.Tensor:
        return loss_on(module, w, *rows)

    def slope(w: Any) -> torch.Tensor:
        pairs = zip(fm.tree.leaves(torch.func.grad(loss)(w)), fm.tree.leaves(along), strict=True)
        return sum((a * b).sum() for a, b in pairs)  # type: ignore[return-value]

    def whole(tree: Any) -> dict[str, torch.Tensor]:
        return dict(fm.tree.items(module.whole(tree)))

    own = [x.clone().requires_grad_() for x in fm.tree.leaves(weights)]
    tree = fm.tree.unflatten(weights, dict(zip(dict(fm.tree.items(weights)), own, strict=True)))
    grads = torch.autograd.grad(loss(tree), own, create_graph=True)
    twice = torch.autograd.grad(sum((g * 0.1).sum() for g in grads), own)
    compiled = torch.func.grad(loss)
    if mesh is not None and "dp" not in mesh:  # one of these says nothing new of the others
        compiled = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    return {
        "forward": {"": torch.func.jvp(loss, (weights,), (along,))[1]},
        "forward over reverse": whole(
            torch.func.jvp(torch.func.grad(loss), (weights,), (along,))[1]
        ),
        "reverse over reverse": whole(torch.func.grad(slope)(weights)),
        "autograd twice": whole(
            fm.tree.unflatten(weights, dict(zip(model.by_path, twice, strict=True)))
        ),
        "compiled": whole(compiled(weights)),
        "first": whole(torch.func.grad(loss)(weights)),
    }


def on_all() -> dict[str, Any]:
    return {name: derivatives(mesh, **options) for name, (mesh, options) in MESHES.items()}


@pytest.fixture(scope="module")
def on_two() -> Any:
    return on_ranks(2, on_all)[0]


@pytest.fixture(scope="module")
def alone() -> Any:
    return on_one(derivatives, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_derivatives(name: str, on_two: Any, alone: Any):
    assert set(alone) == {*KINDS, "first"}
    for kind in KINDS:
        for path, expected in alone["first" if kind == "compiled" else kind].items():
            atol = 2e-5 * expected.abs().max().item()
            found = on_two[name][kind][path]
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=atol, msg=f"{kind} {path}")
