"""Two pipeline stages train as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcmodels as fm
from compiler.parts import parts_of
from compiler.pipeline import cut_into_stages
from compiler.trace import trace
from funcmodels import ops
from funcmodels.errors import ShardingError
from tests import tiny_llama
from tests.compiler.programs import TABLE, small
from tests.distributed.ranks import DEVICE, mesh_of, on_one, on_ranks

STEPS, VOCAB = 3, 64


def model() -> fm.Model:
    return tiny_llama.tiny(vocab_size=VOCAB, num_hidden_layers=3)


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, segment ids and targets, of four rows: two microbatches."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (4, 9), generator=generator).to(DEVICE)
    segments = (torch.arange(8) > 4).long().expand(4, 8).to(DEVICE)
    return tokens[:, :-1], segments, tokens[:, 1:]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def staged(schedule: str) -> dict[str, Any]:
    """Some steps of SGD in stages: losses and the first gradients that this stage has."""
    import torch.distributed.pipelining as pipelining

    stage = fm.pipeline_stage(model(), mesh_of(pp=2), segments=True)
    stage.load(tiny_llama.weights_of(stage.model))
    make = getattr(pipelining, schedule)
    run = make(stage.pipelined(), n_microbatches=2, loss_fn=loss_of)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.3)
    losses, first = [], None
    for step in range(STEPS):
        tokens, segments, targets = batch(step)
        parts: list[Tensor] = []
        if stage.index == 0:
            run.step(tokens, segment_ids=segments)
        else:
            run.step(segment_ids=segments, target=targets, losses=parts)
        grads = {path: p.grad.clone() for path, p in stage.weights().items()}
        first = first or grads
        losses += [torch.stack(parts).mean().detach()] if parts else []
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "grads": first, "weights": stage.state_dict()}


def both() -> dict[str, Any]:
    return {name: staged(name) for name in ("ScheduleGPipe", "Schedule1F1B")}


@pytest.fixture(scope="module")
def on_two() -> list[Any]:
    return on_ranks(2, both)


def alone() -> dict[str, Any]:
    module = fm.compile_to_torch(model())
    module.load(tiny_llama.weights_of(module.model)).to(DEVICE)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    losses, first = [], None
    for step in range(STEPS):
        tokens, segments, targets = batch(step)
        loss = loss_of(module(tokens, None, segments), targets)
        loss.backward()
        first = first or {path: p.grad.clone() for path, p in module.named_parameters()}
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "grads": first, "weights": module.state_dict()}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ScheduleGPipe", "Schedule1F1B"])
def test_two_stages(schedule: str, on_two: list[Any]):
    expected = on_one(alone)
    first, last = (rank[schedule] for rank in on_two)
    torch.testing.assert_close(last["losses"], expected["losses"], rtol=1e-5, atol=0)
    for kind in ("grads", "weights"):
        found = {**first[kind], **last[kind]}
        assert len(first[kind]) > 5
        assert len(last[kind]) > 5
        assert found.keys() == expected[kind].keys()
        for path, value in expected[kind].items():
            atol = 1e-5 * value.abs().max().item()
            torch.testing.assert_close(found[path], value, rtol=1e-5, atol=atol, msg=path)


def test_stages_have_about_equally_many_parameters():
    model_ = tiny_llama.tiny(num_hidden_layers=6)
    program = trace(model_, batched=True)
    parts = parts_of(program)
    assert cut_into_stages(program, parts, 2) == [0, 4, 8]  # the embedding, six layers, the head
    with pytest.raises(ShardingError, match="cannot be cut into 9 pipeline stages"):
        cut_into_stages(program, parts, 9)


def test_tied_parameters_are_refused():
    program = trace(tiny_llama.tiny(tie_word_embeddings=True), batched=True)
    with pytest.raises(ShardingError, match="embed is used in two pipeline stages"):
        cut_into_stages(program, parts_of(program), 2)


@fm.block
def shifted(x: Tensor, tokens: Tensor) -> Tensor:
    return x + tokens.to(x.dtype)[..., None]


def test_a_model_whose_blocks_read_the_tokens_is_refused():
    def forward(params, tokens, positions, segment_ids=None):
        x = shifted(ops.embed(tokens, params["embed"]), tokens)
        return ops.unembed(shifted(x, tokens), params["head"])

    program = trace(small(forward, sharding=TABLE), batched=True)
    with pytest.raises(ShardingError, match="a later block reads the tokens"):
        cut_into_stages(program, parts_of(program), 3)
