"""`fm.pack`, and that no document sees another or has a loss for it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcmodels as fm
from funcmodels.errors import ShapeError
from tests.tiny_llama import tiny, weights_of

LENGTH = 16


def documents(*lengths):
    return [torch.randint(1, 64, (n,)) for n in lengths]


def found_in(packed):
    """Every document in a pack, as lists, with its positions and its losses."""
    for row in zip(*packed.values(), strict=True):
        tokens, positions, ids, mask = row
        for number in ids[ids >= 0].unique():
            at = ids == number
            yield tokens[at].tolist(), positions[at].tolist(), mask[at].tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), max_size=40), max_size=12), st.integers(2, 17))
def test_every_token_of_every_document_is_there_once(given_documents, length):
    packed = fm.pack(given_documents, length)
    assert {t.shape[1] for t in packed.values()} == {length}
    pieces = [d[i : i + length] for d in given_documents for i in range(0, len(d), length)]
    found = list(found_in(packed))
    assert sorted(tokens for tokens, _, _ in found) == sorted(pieces)
    for tokens, positions, mask in found:
        assert positions == list(range(len(tokens)))
        assert mask == [True] * (len(tokens) - 1) + [False]
    padding = packed["segment_ids"] < 0
    assert not packed["loss_mask"][padding].any()
    assert (packed["positions"] < length).all()


def test_rows_are_filled_by_what_fits_best():
    packed = fm.pack([[1] * 10, [2] * 12, [3] * 4, [4] * 6], LENGTH, pad=9)
    assert packed["tokens"].tolist() == [[1] * 10 + [4] * 6, [2] * 12 + [3] * 4]
    assert fm.pack([[1, 2]], 4, pad=9)["tokens"].tolist() == [[1, 2, 9, 9]]


@pytest.mark.parametrize("changed", range(4))
def test_no_document_moves_when_another_changes(changed):
    model = tiny()
    weights = weights_of(model)
    given_documents = documents(7, 5, 9, 4)
    packed = fm.pack(given_documents, LENGTH)
    before = fm.loss(model, weights, packed, reduction="none")
    given_documents[changed] = (given_documents[changed] + 1) % 64
    other = fm.pack(given_documents, LENGTH)
    after = fm.loss(model, weights, other, reduction="none")
    differs = packed["tokens"] != other["tokens"]
    assert differs.sum() == len(given_documents[changed])
    assert (before != after)[differs & packed["loss_mask"]].all()  # its own losses do move
    torch.testing.assert_close(before[~differs], after[~differs], rtol=0, atol=0)


def test_a_pack_has_the_losses_of_its_documents_alone():
    model = tiny()
    weights = weights_of(model)
    given_documents = documents(7, 5, 9, 4, 16)
    packed = fm.pack(given_documents, LENGTH)
    alone = [fm.loss(model, weights, {"tokens": d}, reduction="sum") for d in given_documents]
    together = fm.loss(model, weights, packed, reduction="sum")
    torch.testing.assert_close(together, sum(alone))
    count = sum(len(d) - 1 for d in given_documents)
    assert int(packed["loss_mask"].sum()) == count
    torch.testing.assert_close(fm.loss(model, weights, packed), together / count)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ShapeError, match="must hold a token and the one after it"):
        fm.pack([[1, 2]], 1)
    with pytest.raises(ShapeError, match="sequence of token ids"):
        fm.pack([[[1, 2]]], 4)
    with pytest.raises(ShapeError, match="sequence of token ids"):
        fm.pack([[0.5]], 4)
    with pytest.raises(ShapeError, match=r"a str, 'two words'[^~]*tokenizer.encode\(text\)"):
        fm.pack(["two words"], 4)
    assert fm.pack([], 4)["tokens"].shape == (0, 4)
