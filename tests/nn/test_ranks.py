"""The layers on two ranks: the values and the gradients of one process, from parts."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.func import functional_call

import funcmodels as fm
from funcmodels.errors import FuncModelsError
from tests.distributed.ranks import mesh_of, on_ranks
from tests.nn.modules import HIDDEN, INNER, VOCAB, Decoder, decoder, tokens

pytestmark = pytest.mark.slow  # two processes, which compile


def gradients(module: Decoder) -> dict[str, torch.Tensor]:
    module.zero_grad()
    module.loss(tokens()).backward()
    return fm.nn.whole(module, {n: p.grad for n, p in module.named_parameters()})


def values(mesh: Any) -> dict[str, Any]:
    """What one process and two must agree on."""
    module = decoder(mesh)
    params = {n: p.detach() for n, p in module.named_parameters()}
    found: dict[str, Any] = {
        "weights": fm.nn.whole(module),
        "logits": module(tokens()).detach(),
        "backward": gradients(module),
        "losses": module.head.cross_entropy(
            module.hidden(tokens()), tokens(), reduction="none", z_loss=0.1
        ).detach(),
    }
    found["sum"] = module.head.cross_entropy(module.hidden(tokens()), tokens(), reduction="sum")

    def by_logits(params: Any, rows: torch.Tensor) -> torch.Tensor:
        return functional_call(module, params, (rows,)).square().mean()

    by = torch.func.grad(by_logits)
    found["func.grad"] = fm.nn.whole(module, by(params, tokens()))
    each = torch.func.vmap(by, (None, 0))(params, tokens())
    found["vmap"] = [fm.nn.whole(module, {n: g[i] for n, g in each.items()}) for i in range(2)]
    direction = {n: torch.ones_like(p) for n, p in params.items()}
    along = (params,), (direction,)
    _, found["jvp"] = torch.func.jvp(lambda p: by_logits(p, tokens()), *along)
    _, second = torch.func.jvp(lambda p: by(p, tokens()), *along)
    found["second"] = fm.nn.whole(module, second)
    found["compiled"] = compiled(module)
    found["copied"] = gradients(copy.deepcopy(module))
    found["steps"] = trained(module)
    return found


def compiled(module: Decoder) -> dict[str, torch.Tensor]:
    """The gradients, where forward and backward are compiled, without a break of the graph."""
    whole = torch.compile(module.loss, backend="aot_eager", fullgraph=True)
    module.zero_grad()
    whole(tokens()).backward()
    return fm.nn.whole(module, {n: p.grad for n, p in module.named_parameters()})


def trained(module: Decoder) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module.loss(tokens()).backward()
        optimizer.step()
    return fm.nn.whole(module)


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except (FuncModelsError, IndexError) as error:
        return str(error)
    return "nothing was refused"


def of_ranks() -> dict[str, Any]:
    mesh = mesh_of(tp=2)
    module = decoder(mesh)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    column, row = module.mlp.up, module.mlp.down
    return {
        **values(mesh),
        "shapes": {n: tuple(p.shape) for n, p in module.state_dict().items()},
        "printed": repr(column),
        "saved": torch.equal(loaded(tokens()), module(tokens())),
        "of a group": fm.nn.ColumnParallelLinear(4, 6, mesh=dist.group.WORLD).weight.shape,
        "of one dim": fm.nn.RowParallelLinear(4, 6, mesh=mesh_of(tp=2)["tp"]).weight.shape,
        "errors": {
            "out_features": refused(lambda: fm.nn.ColumnParallelLinear(4, 5, mesh=mesh)),
            "in_features": refused(lambda: fm.nn.RowParallelLinear(5, 4, mesh=mesh)),
            "num_embeddings": refused(lambda: fm.nn.VocabParallelEmbedding(97, 4, mesh=mesh)),
            "no tp": refused(lambda: fm.nn.RowParallelLinear(4, 4, mesh=mesh_of(dp=1, fsdp=2))),
            "no mesh": refused(lambda: fm.nn.RowParallelLinear(4, 4, mesh=2)),  # type: ignore[arg-type]
            "whole x": refused(lambda: row(torch.zeros(1, INNER).double())),
            "part of x": refused(lambda: column(torch.zeros(1, HIDDEN // 2).double())),
            "part again": refused(lambda: module.mlp.back(torch.zeros(1, INNER // 2).double())),
            "token": refused(lambda: module.embed(torch.tensor([VOCAB]))),
            "negative token": refused(lambda: module.embed(torch.tensor([-1]))),
            "a part": refused(lambda: fm.nn.load_whole(module, module.state_dict())),
            "targets": refused(
                lambda: module.head.cross_entropy(torch.zeros(2, HIDDEN), torch.zeros(3))
            ),
            "smoothing": refused(
                lambda: module.head.cross_entropy(
                    torch.zeros(2, HIDDEN), torch.zeros(2).long(), label_smoothing=2.0
                )
            ),
        },
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(2, of_ranks)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return values(None)


SAME = ("weights", "logits", "backward", "losses", "sum", "func.grad", "vmap", "jvp", "second",
        "compiled", "copied", "steps")  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_two_ranks_are_one_process(ranks, alone, what):
    for rank in ranks:
        torch.testing.assert_close(rank[what], alone[what], rtol=1e-9, atol=1e-11)


def test_each_rank_holds_its_part(ranks):
    shapes = {n: tuple(p.shape) for n, p in decoder().state_dict().items()}
    for rank in ranks:
        for name, got in rank["shapes"].items():
            *path, parameter = name.split(".")
            cut = decoder().get_submodule(".".join(path)) if path[-1:] != ["attn"] else None
            want = list(shapes[name])
            if cut is not None and parameter in cut.cuts:
                want[cut.cuts[parameter]] //= 2
            assert got == tuple(want), name


def test_copies_files_and_groups(ranks):
    for n, rank in enumerate(ranks):
        assert rank["saved"]
        assert rank["of a group"] == (3, 4)
        assert rank["of one dim"] == (6, 2)
        assert rank["printed"] == (
            f"ColumnParallelLinear(weight=(24, 16), bias=(24,), rank {n} of 2)"
        )


REFUSED = {
    "out_features": r"do not divide out_features\n +got: +out_features=5, 2 ranks[\s\S]*=6",
    "in_features": r"RowParallelLinear: the ranks do not divide in_features[\s\S]*in_features=6",
    "num_embeddings": r"num_embeddings=97[\s\S]*num_embeddings=98, with rows that no token uses",
    "no tp": r"\('dp', 'fsdp'\)[\s\S]*fix: +mesh=mesh.get_group\('fsdp'\)",
    "no mesh": r"got: +mesh=2[\s\S]*init_device_mesh",
    "whole x": r"x \(1, 24\), rank \d of 2[\s\S]*\(..., 12\)[\s\S]*fix: +input_is_parallel=False",
    "part of x": r"need: +\(..., 16\)[\s\S]*fix: +gather_output=True",
    "part again": r"need: +\(..., 24\): in_features=24, whole\n +fix: +input_is_parallel=True",
    "token": r"index out of range",
    "negative token": r"index out of range",
    "a part": r"not the whole[\s\S]*fix: +module.load_state_dict",
    "targets": r"targets must hold",
    "smoothing": r"label_smoothing is out of range",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(ranks, what):
    for rank in ranks:
        assert re.search(REFUSED[what], rank["errors"][what]), rank["errors"][what]


def test_every_refusal_was_asked_for(ranks):
    assert ranks[0]["errors"].keys() == REFUSED.keys()
