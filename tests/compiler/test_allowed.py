"""What a model function may do, in whatever spelling: it is recorded, and keeps its values.

So does what a served file would have of it, as text.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcmodels as fm
from compiler.emit.block import statements, symbol_lines
from compiler.emit.helpers import helpers
from compiler.emit.scope import Module, Scope
from compiler.ir import Program
from compiler.modules import Placed
from compiler.needs import Exact
from compiler.partition import partition
from compiler.tokens_apart import check_tokens_apart
from compiler.trace import trace
from tests.compiler.programs import evaluated, inputs_of, weights_of
from tests.compiler.refusals import model_of


def updates_list(p, x, s):
    seen = []
    for layer in p["layers"]:
        x = x * layer["w"]
        seen.append(x)
    return sum(seen)


ALLOWED = {
    "detach": lambda p, x, s: x.detach() * p["w"],
    "data": lambda p, x, s: x.data * p["w"],
    "where": lambda p, x, s: torch.where(x > 0, x, 0.0),
    "to its own dtype": lambda p, x, s: x.to(x.dtype) * 2,
    "to its own device": lambda p, x, s: x.to(x.device) * 2,
    "through float": lambda p, x, s: (x.float() * 2).to(x.dtype),
    "new_zeros": lambda p, x, s: x + x.new_zeros(x.shape) + x.new_ones(16),
    "list": updates_list,
    "no dropout": lambda p, x, s: F.dropout1d(F.dropout(x, 0.1, training=False), p=0.0)
        + torch.dropout(x, 0.1, train=False) + F.alpha_dropout(x, 0.1, False),
    "assert on sizes": lambda p, x, s: x if x.shape[0] == s.shape[0] else None,
    "flip features": lambda p, x, s: x.flip(-1) + x.roll(1, -1),
    "numbers": lambda p, x, s: 1 - x + 2 / (x * x + 1) + 2**x + torch.rsub(x, 1.0, alpha=2),
    "integers": lambda p, x, s: x * ((~s & 3) | (s ^ 1) | (7 % (s + 1)) | (s >> 1))[..., None],
    "in blocks of heads": lambda p, x, s: x.view(x.shape[0], 4, 4).mT.flatten(-2),
    "a negative base": lambda p, x, s: x * ((-1) ** s + (-2.0) ** (s % 3))[:, None],
    "an empty index": lambda p, x, s: x[()] * 2 - x.expand(size=x.shape),
    "matrix times vector": lambda p, x, s: x * (x @ p["w"])[..., None],
    "expand": lambda p, x, s: x * p["w"].expand(x.shape) + p["w"].expand_as(x),
    "row of a table": lambda p, x, s: x + p["embed"][s] + F.embedding(s, p["embed"]),
    "by name": lambda p, x, s: F.linear(input=x, weight=torch.matmul(p["m"].T, other=p["m"])),
    "norms": lambda p, x, s: F.layer_norm(F.rms_norm(x, (16,), p["w"], 1e-5), (16,)),
    "largest": lambda p, x, s: x * x.topk(3, -1).values.sum(-1, keepdim=True) / x.norm(dim=-1, keepdim=True),
    "sorted": lambda p, x, s: x.sort(-1).values * x.argmax(-1, keepdim=True),
    "gather": lambda p, x, s: x * x.gather(-1, s[:, None] % 16),
    "one hot": lambda p, x, s: x + F.one_hot(s % 16, 16).to(x.dtype),
    "groups": lambda p, x, s: F.group_norm(x, 4, p["w"], p["w"]) * F.avg_pool1d(x, 4).sum(-1, True),
    "rotation": lambda p, x, s: torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (8, 2)))
        * torch.polar(torch.ones(8).double(), s[:, None] * p["w"][:8].double()).conj()).flatten(-2).to(x.dtype),
    "distances": lambda p, x, s: x * torch.cdist(x, p["m"]).sum(-1, True) * torch.isin(s, torch.tensor([1, 3]))[:, None],
    "places": lambda p, x, s: x * torch.searchsorted(torch.tensor([1, 3]), s)[:, None] * x.new_tensor([1.0, 2.0] * 8),
    "written": lambda p, x, s: x.select_scatter(x[:, 3], 1, 0).slice_scatter(x[:, :2], 1, 2, 4)
        .index_add(1, torch.tensor([0, 3]), x[:, 4:6]),
    "signs": lambda p, x, s: torch.where(x.float().view(torch.int32) < 0, x, 2 * x) + torch.cat(x.hsplit(2)[::-1], 1),
    "constants": lambda p, x, s: x * torch.tensor([1.0, 2.0] * 8) + torch.arange(16),
    "positions": lambda p, x, s: torch.where((s > 2)[:, None], x, p["w"]) * s[:, None].to(x.dtype),
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name):
    model = model_of(ALLOWED[name])
    program = trace(model)
    text = Written(program)
    weights = weights_of(model)
    for count in (5, 9):
        tokens, positions = inputs_of(count)
        want = model.forward(weights, tokens, positions)
        for got in (
            evaluated(program, weights, tokens, positions),
            text(weights, tokens, positions),
        ):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)
    check_tokens_apart(program)


class Written:
    """A program without layers as the text that a served file would have of it."""

    def __init__(self, program: Program) -> None:
        whole = partition(program, "none")
        block, self.attrs = whole.root, {name: f"p{i}" for i, name in enumerate(whole.root.params)}
        module = Module("Small", {}, Exact([]))
        scope = Scope(module, block, Placed(bare=self.attrs))
        for computed in scope.computed.values():  # of these, the file would hold the results
            del scope.names[computed.value]
        scope.computed, scope.loaded = {}, set()
        self.inputs = [scope.bind(node) for node in block.inputs]
        lines = statements(scope, [n for n in block.graph.nodes if n.op != "output"], 0)
        sizes = [line.strip() for line in symbol_lines(scope)]
        (result,) = map(scope.value, block.results)
        self.text = "\n".join([*sizes, *lines, f"result = {result}"])
        self.helpers = "\n".join(line for h in module.helpers for line in helpers()[h].lines)

    def __call__(self, weights: Any, *given: Tensor) -> Tensor:
        own = {self.attrs[path]: value for path, value in fm.tree.items(weights)}
        names: dict[str, Any] = {"torch": torch, "F": F}
        exec(self.helpers, names)
        names |= dict(zip(self.inputs, given, strict=True))
        exec(self.text, names | {"self": SimpleNamespace(dtype=torch.float64, **own)}, names)
        return names["result"]
