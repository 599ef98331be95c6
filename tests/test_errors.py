"""The messages of the declaration layer, word for word: they are part of the interface."""

from __future__ import annotations

import textwrap

import pytest

import funcmodels as fm
from funcmodels import errors


def said(error: type[Exception], call) -> str:
    """The message of the error, without the line numbers of this file."""
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


def forward(params, tokens, positions, segment_ids=None):
    return tokens


def test_the_lines_and_their_order():
    error = errors.ShardingError(
        "what failed", fix="do this\nor that", got="a", from_="x.py:1", need="b", note="c"
    )
    assert str(error) == textwrap.dedent("""\
        ShardingError: what failed
          got:  a
          need: b
          note: c
          from: x.py:1
          fix:  do this
                or that""")
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "none"), (2, "0, 1"), (5, "0, 1, 2, 3, 4"), (7, "0, 1, 2, 3, 4, ... and 2 more")],
)
def test_at_most_five_names(n, text):
    assert errors.listed(str(i) for i in range(n)) == text


def test_unknown_axis():
    P = fm.axes(hidden=4, heads=2)
    text = said(errors.DeclarationError, lambda: P("haeds hidden"))
    assert text.startswith('DeclarationError: unknown axis "haeds"\n')
    assert "need: axes declared in fm.axes(): hidden, heads\n" in text
    assert "from: test_errors.py:" in text
    assert text.endswith('fix:  did you mean "heads"?')
    text = said(errors.DeclarationError, lambda: P("zzz"))
    assert text.endswith("fix:  add zzz=... to fm.axes()")


def test_axis_named_twice():
    P = fm.axes(hidden=4)
    text = said(errors.DeclarationError, lambda: P("hidden hidden"))
    assert text.endswith("fix:  fm.axes(..., hidden_out=4) and use it for one of the two")


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_bad_size(size):
    text = said(errors.DeclarationError, lambda: fm.axes(hidden=size))
    assert 'axis "hidden" has no valid size' in text


def test_two_dims_on_one_mesh_axis():
    P = fm.axes(vocab=8, hidden=4)
    params = {"embed": P("vocab hidden")}
    text = said(
        errors.ShardingError,
        lambda: fm.Model("M", {}, params, forward, sharding={"vocab": "tp", "hidden": "tp"}),
    )
    assert text == textwrap.dedent(f"""\
        ShardingError: two dims of one tensor on mesh axis "tp"
          got:  "vocab" and "hidden" of (vocab, hidden)
          need: at most one dim of a tensor on a mesh axis
          from: {params["embed"].where}
          fix:  sharding=fm.PartitionSpec('tp', None) on this parameter, or """) + (
        'leave "hidden" out of the table'
    )


def test_unknown_mesh_axis():
    params = {"w": fm.axes(a=2)("a")}
    text = said(
        errors.ShardingError, lambda: fm.Model("M", {}, params, forward, sharding={"a": "tpp"})
    )
    assert 'unknown mesh axis "tpp"' in text


def test_sharding_of_an_axis_that_no_parameter_has():
    params = {"w": fm.axes(heads=2, mlp=3)("heads")}
    text = said(
        errors.DeclarationError, lambda: fm.Model("M", {}, params, forward, sharding={"head": "tp"})
    )
    assert text.endswith('fix:  did you mean "heads"?')


def test_partition_spec_of_another_rank():
    P = fm.axes(a=2, b=3)
    params = {"w": P("a b", sharding=fm.PartitionSpec("tp"))}
    text = said(errors.ShardingError, lambda: fm.Model("M", {}, params, forward))
    assert "a PartitionSpec of 1 dims on a parameter of 2" in text
    assert text.endswith("fix:  PartitionSpec(None, None)")


@pytest.mark.parametrize(
    "bad",
    [
        lambda params, tokens: None,
        lambda params, tokens, positions, segment_ids: None,
        lambda params, tokens, positions, segment_ids=None, extra=1, *, must: None,
        lambda params, tokens, positions, *, segment_ids=None: None,
    ],
    ids=["too few", "no default", "one more", "by keyword"],
)
def test_bad_forward_signature(bad):
    text = said(errors.DeclarationError, lambda: fm.Model("M", {}, {}, bad))
    assert "<lambda> does not take what a model takes" in text
    assert text.endswith("fix:  def forward(params, tokens, positions, segment_ids=None): ...")


def test_leaf_that_is_no_declaration():
    text = said(errors.DeclarationError, lambda: fm.Model("M", {}, {"a": [1.0]}, forward))
    assert "a.0 is not a declaration\n  got:  float\n" in text


def test_name_that_cannot_name_a_class():
    text = said(errors.DeclarationError, lambda: fm.Model("my-model", {}, {}, forward))
    assert text.endswith("fix:  'mymodel'")


def test_unknown_initialiser():
    P = fm.axes(a=2)
    text = said(errors.DeclarationError, lambda: P("a", init="one"))
    assert "unknown initialiser 'one'" in text


def test_two_parameters_in_one_tensor():
    P = fm.axes(a=2)
    params = {"layers": [{"w": P("a", hf="w.weight")} for _ in range(2)]}
    text = said(errors.DeclarationError, lambda: fm.Model("M", {}, params, forward))
    assert 'two parameters are stored in one tensor "w.weight"' in text
    assert "got:  layers.0.w and layers.1.w" in text


def test_brace_that_names_nothing():
    P = fm.axes(a=2)
    params = {"layers": [{"w": P("a", hf="h.{layer}.w")}]}
    text = said(errors.DeclarationError, lambda: fm.Model("M", {}, params, forward))
    assert '"{layer}" in the tensor name of layers.0.w is no list and no axis' in text
    assert text.endswith("fix:  write {layers}, or drop the braces")


@pytest.mark.parametrize("layout", ["a", "a b b", "a c", "(a b) c"])
def test_layout_that_is_no_bijection(layout):
    P = fm.axes(a=2, b=3)
    params = {"w": P("a b", hf=f"w: {layout}")}
    text = said(errors.DeclarationError, lambda: fm.Model("M", {}, params, forward))
    assert "the checkpoint layout of w does not use each axis exactly once" in text
