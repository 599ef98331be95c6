"""Embeddings and classes by the pure function, and what models may be declared for."""

import pytest
import torch
import torch.nn.functional as F

import funcmodels as fm
from funcmodels.errors import DeclarationError, ShapeError, TaskError

P = fm.axes(vocab=7, hidden=4)


def model_of(task="embed", pooling="last", **changes):
    """A table: the vector of a token depends on it alone."""
    return fm.Model(
        "Table",
        config=None,
        params={"table": P("vocab hidden")},
        forward=lambda p, tokens, positions, segment_ids=None: p["table"][tokens],
        task=task,
        pooling=pooling,
        **changes,
    )


TABLE = {"table": torch.randn(7, 4, generator=torch.Generator().manual_seed(0))}
ROWS = [[1, 2, 3], [4], [6, 0]]
POOLED = {
    "last": lambda t: torch.stack([t[3], t[4], t[0]]),
    "cls": lambda t: torch.stack([t[1], t[4], t[6]]),
    "mean": lambda t: torch.stack([t[[1, 2, 3]].mean(0), t[4], t[[6, 0]].mean(0)]),
}


@pytest.mark.parametrize("pooling", POOLED)
def test_closed_forms(pooling):
    want = POOLED[pooling](TABLE["table"])
    raw = fm.embed(model_of(pooling=pooling, normalize=False), TABLE, ROWS)
    torch.testing.assert_close(raw, want)
    unit = fm.embed(model_of(pooling=pooling), TABLE, ROWS)
    torch.testing.assert_close(unit, F.normalize(want, dim=-1))
    classes = fm.classify(model_of("classify", pooling), TABLE, ROWS)
    torch.testing.assert_close(classes, want.softmax(-1))


def test_one_sequence_and_one_label():
    assert fm.embed(model_of(), TABLE, [1, 2]).shape == (4,)
    assert fm.embed(model_of(), TABLE, torch.tensor([[1, 2]])).shape == (1, 4)
    one = {"table": TABLE["table"][:, :1]}
    probability = fm.classify(model_of("classify"), one, [3])
    torch.testing.assert_close(probability, one["table"][3].sigmoid())


def test_low_precision_is_pooled_in_float32():
    half = {"table": TABLE["table"].bfloat16()}
    got = fm.embed(model_of(pooling="mean", normalize=False), half, [1, 2, 3])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, half["table"][[1, 2, 3]].float().mean(0))


def test_an_empty_sequence_is_refused():
    with pytest.raises(ShapeError, match="prompt 1 is empty"):
        fm.embed(model_of(), TABLE, [[1], []])


@pytest.mark.parametrize(
    ("call", "task"),
    [
        (fm.embed, "classify"),
        (fm.classify, "embed"),
        (fm.embed, "generate"),
        (fm.logprobs, "embed"),
        (lambda *args: fm.generate(*args, max_new_tokens=1), "classify"),
    ],
)
def test_another_task_is_refused(call, task):
    model = model_of(task, None if task == "generate" else "last")
    with pytest.raises(TaskError, match=f"got:  task='{task}'(.|\\n)*fix:  fm.{task}"):
        call(model, TABLE, [1, 2])


@pytest.mark.parametrize(
    ("task", "pooling", "message"),
    [
        ("score", "last", "unknown task"),
        ("embed", None, 'fix:  fm.Model\\(..., task=.embed., pooling="last"\\)'),
        ("classify", "max", "pooling='max'"),
        ("generate", "mean", "nothing to pool"),
    ],
)
def test_declarations_that_cannot_work(task, pooling, message):
    with pytest.raises(DeclarationError, match=message):
        model_of(task, pooling)
