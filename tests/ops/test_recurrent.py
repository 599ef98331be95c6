"""`ops.recurrent`: a scan over tokens, against loops in float64, and what it refuses."""

import functools
import re
import sys

import pytest
import torch
from einops import einsum

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import DeclarationError, ShapeError, TraceError
from funcmodels.ops import recurrent_check
from funcmodels.ops.linear_attention import chunked as linear_chunked
from funcmodels.ops.linear_attention import memory
from funcmodels.ops.linear_attention import step as linear_step
from funcmodels.ops.recurrent_layout import Layout

STATE = fm.state(h="hidden", dtype=torch.float64, hidden=3)


def leaky(state, x):
    h = 0.5 * state["h"] + x
    return {"h": h}, torch.tanh(h)


def leaky_chunk(state, x):
    powers = 0.5 ** torch.arange(1, x.shape[-2] + 1, dtype=x.dtype)
    lower = (0.5 ** (torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-2]))).tril()
    h = einsum(lower.to(x.dtype), x, "t s, ... s d -> ... t d")
    h = h + powers[:, None] * state["h"][..., None, :]
    return {"h": h[..., -1, :]}, torch.tanh(h)


def by_hand(x, starts=(0,)):
    """The leaky recurrence of one row, written out."""
    h, out = torch.zeros_like(x[0]), []
    for t, now in enumerate(x):
        h = now if t in starts else 0.5 * h + now
        out.append(torch.tanh(h))
    return torch.stack(out)


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("chunked", [None, leaky_chunk])
@pytest.mark.parametrize("shape", [(7, 3), (2, 7, 3), (2, 4, 7, 3)])
def test_equals_a_loop(shape, chunked):
    x = rows(*shape)
    want = torch.stack([by_hand(row) for row in x.reshape(-1, 7, 3)]).reshape(shape)
    y = ops.recurrent(leaky, STATE, x, chunked=chunked, chunk=4)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunked", [None, leaky_chunk])
@pytest.mark.parametrize("chunk", [1, 3, 4, 64])
def test_documents_begin_anew(chunked, chunk):
    x = rows(2, 12, 3)
    ids = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [4] * 12])
    y = ops.recurrent(leaky, STATE, x, chunked=chunked, chunk=chunk, segment_ids=ids)
    want = torch.stack([by_hand(x[0], (0, 5, 6)), by_hand(x[1])])
    torch.testing.assert_close(y, want, rtol=0, atol=1e-12)


def test_no_gradient_crosses_documents():
    x, ids = rows(1, 9, 3), torch.tensor([[0] * 4 + [1] * 5])

    def second(x):
        y = ops.recurrent(leaky, STATE, x, chunked=leaky_chunk, chunk=4, segment_ids=ids)
        return y[:, 4:].sum()

    grad = torch.func.grad(second)(x)
    assert (grad[:, :4] == 0).all()
    assert (grad[:, 4:] != 0).all()


@pytest.mark.parametrize(
    ("chunked", "remat"), [(None, False), (leaky_chunk, False), (leaky_chunk, True)]
)
def test_transforms(chunked, remat):
    x, tangent = rows(5, 6, 3), rows(5, 6, 3, seed=1)

    def f(x):
        return ops.recurrent(leaky, STATE, x, chunked=chunked, chunk=4, remat=remat)

    def loop(x):
        return torch.func.vmap(by_hand)(x)

    got, want = torch.func.jvp(f, (x,), (tangent,)), torch.func.jvp(loop, (x,), (tangent,))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.func.vmap(f)(x), loop(x), rtol=0, atol=1e-12)
    hessian = torch.func.hessian(lambda row: f(row).sum())(x[0])
    torch.testing.assert_close(
        hessian, torch.func.hessian(lambda row: by_hand(row).sum())(x[0]), rtol=0, atol=1e-12
    )


def kept(f, *args):
    """What a backward pass keeps of f beside its arguments, in bytes; and the gradients."""
    args, found = [x.clone().requires_grad_() for x in args], {}

    def keep(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = f(*args)
    size = sum(n for at, n in found.items() if all(at != x.data_ptr() for x in args))
    return size, torch.autograd.grad(y.square().sum(), args)


@pytest.mark.parametrize("packed", [False, True])
def test_remat_keeps_the_states_alone(packed):
    ids = torch.arange(256)[None] // 100 if packed else None
    of = {"q": rows(1, 256, 2, 8), "k": rows(1, 256, 2, 8), "v": rows(1, 256, 2, 8)}
    args = (*of.values(), -rows(1, 256, 2).abs())

    def f(remat, *args):
        return ops.gated_linear_attention(*args, segment_ids=ids, remat=remat)

    (most, want), (least, got) = (
        kept(functools.partial(f, remat), *args) for remat in (False, True)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    states = 8 * (2 * 8 * 8) * (6 if packed else 4)  # bytes: one state before each chunk
    laid_out = 8 * (3 * 16 + 2) * 6 * 64 + 20_000 if packed else 0  # longer rows, and their order
    assert least <= 2 * states + laid_out  # a sum has its gradient's state beside it
    assert most > 4 * least


@pytest.mark.slow
def test_what_is_compiled_is_the_same(monkeypatch):
    """Few chunks lie in the graph, many beside it; tokens are taken by eights, and the rest."""
    monkeypatch.setattr(sys.modules["funcmodels.ops.recurrent"], "BACKEND", "aot_eager")
    x, ids = rows(2, 43, 3), torch.arange(43).expand(2, 43) // 15

    def f(x, chunked, chunk, remat, ids):
        y = ops.recurrent(
            leaky, STATE, x, chunked=chunked, chunk=chunk, remat=remat, segment_ids=ids
        )
        return y.square().sum()

    def short(x):
        y = ops.recurrent(leaky, STATE, x, chunked=leaky_chunk, chunk=16, batch_dims=1)
        return y.square().sum()

    compiled = torch.compile(f, backend="aot_eager")
    for options in (
        (None, 1, False, None),
        (None, 1, False, ids),
        (leaky_chunk, 2, False, None),
        (leaky_chunk, 2, True, ids),
        (leaky_chunk, 16, True, None),
    ):
        found = []
        for fn in (f, compiled):
            leaf = x.clone().requires_grad_()
            loss = fn(leaf, *options)
            found.append((loss, *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    gradient = torch.func.grad(lambda x: compiled(x, None, 1, False, None))(x)
    want = torch.func.grad(lambda x: f(x, None, 1, False, None))(x)
    torch.testing.assert_close(gradient, want, rtol=0, atol=1e-12)
    whole = torch.compile(short, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x), short(x), rtol=0, atol=1e-12)


def test_a_step_is_tried_once(monkeypatch):
    tried = []
    found = recurrent_check._found
    monkeypatch.setattr(recurrent_check, "_found", lambda *a: tried.append(a) or found(*a))
    monkeypatch.setattr(recurrent_check, "_FOUND", {})

    def made(factor):
        def step(state, x):
            h = factor * state["h"] + x
            return {"h": h}, h

        return step

    for factor, shape, times in ((1.0, (7, 3), 1), (1.0, (7, 3), 1), (0.5, (7, 3), 2),
                                 (0.5, (2, 7, 3), 3), (0.5, (2, 7, 3), 3)):  # fmt: skip
        y = ops.recurrent(made(factor), STATE, torch.ones(shape, dtype=torch.float64))
        assert len(tried) == times
        torch.testing.assert_close(y[..., 1, :], torch.full_like(y[..., 1, :], 1 + factor))
    ops.recurrent(made(2.0), STATE, rows(7, 3), batch_dims=0)
    ops.recurrent(made(2.0), STATE, rows(7, 3), segment_ids=torch.zeros(7))
    assert len(tried) == 3


def test_a_state_may_begin_with_other_than_zeros():
    """The running maximum of a row, from minus infinity."""

    def largest(state, x):
        m = torch.maximum(state["m"], x)
        return {"m": m}, m

    state = fm.state(m="hidden", dtype=torch.float64, init=-torch.inf, hidden=3)
    x, ids = rows(8, 3), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    y = ops.recurrent(largest, state, x, segment_ids=ids)
    want = torch.cat([x[:3].cummax(0).values, x[3:].cummax(0).values])
    assert torch.equal(y, want)


def test_what_tokens_share_has_a_gradient():
    def scaled(state, x, p):
        h = p["decay"] * state["h"] + x
        return {"h": h}, h

    x, decay = rows(4, 3), torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    grad = torch.func.grad(lambda d: ops.recurrent(scaled, STATE, x, params={"decay": d}).sum())(
        decay
    )
    h, dh, want = torch.zeros(3).double(), torch.zeros(3).double(), torch.zeros(3).double()
    for now in x:
        h, dh = decay * h + now, h + decay * dh
        want = want + dh
    torch.testing.assert_close(grad, want, rtol=0, atol=1e-12)


def test_layout():
    starts = torch.tensor([[1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0]]).bool()
    layout = Layout.of(starts, 2)
    assert layout.token.tolist() == [[0, 1, 2, 2, 3, 3, 4, 5], [0, 1, 2, 3, 4, 5, 5, 5]]
    assert layout.place.tolist() == [[0, 1, 2, 4, 6, 7], [0, 1, 2, 3, 4, 5]]
    assert layout.begins[0].tolist() == [True, False, True, True]
    x = rows(2, 6, 3)
    assert torch.equal(layout.collect(layout.spread(x)), x)


# --- what is refused -----------------------------------------------------------------------------


def test_a_step_that_changes_its_state():
    def grows(state, x):
        return {"h": torch.cat([state["h"], x], -1)}, x

    def narrows(state, x):
        return {"h": (state["h"] + x).float()}, x

    def forgets(state, x):
        return {}, x

    def widens(state, x, p):
        return {"h": torch.cat([state["h"], p["more"]], -1)}, x

    with pytest.raises(ShapeError, match="widens changes the shape") as error:
        ops.recurrent(widens, STATE, rows(4, 3), params={"more": rows(2)}, batch_dims=0)
    assert re.search(r"from: +test_recurrent.py:\d+ in widens", str(error.value))
    ids = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"grows changes the shape of the state \"h\"") as error:
        ops.recurrent(grows, STATE, rows(4, 3), segment_ids=ids)
    assert "test_recurrent.py" in str(error.value)
    assert re.search(r"from: +test_recurrent.py:\d+ in grows", str(error.value))
    with pytest.raises(ShapeError, match="narrows changes the dtype"):
        ops.recurrent(narrows, STATE, rows(4, 3))
    with pytest.raises(ShapeError, match="forgets returns another state"):
        ops.recurrent(forgets, STATE, rows(4, 3), segment_ids=ids)
    with pytest.raises(ShapeError, match="grows changes the shape"):
        ops.recurrent(grows, STATE, rows(4, 3))


def test_a_step_that_closes_over_a_tensor():
    decay = torch.tensor(0.5)

    def closes(state, x):
        h = decay * state["h"] + x
        return {"h": h}, h

    with pytest.raises(TraceError, match=r'closes uses "decay", a tensor from outside') as error:
        ops.recurrent(closes, STATE, rows(4, 3))
    assert re.search(r"from: +test_recurrent.py:\d+ in closes", str(error.value))


def test_shapes_that_cannot_be_read():
    with pytest.raises(ShapeError, match="xs of wrong shapes"):
        ops.recurrent(leaky, STATE, {"a": rows(4, 3), "b": rows(5, 3)})
    with pytest.raises(ShapeError, match=r"need: +the same 3 first dims in every leaf"):
        ops.recurrent(leaky, STATE, rows(4, 3), batch_dims=2)
    with pytest.raises(ShapeError, match="0 batch dims, as segment_ids have, and not 1"):
        ops.recurrent(leaky, STATE, rows(4, 3), segment_ids=torch.zeros(4), batch_dims=1)
    blind = lambda state, x: (state, x)  # noqa: E731
    with pytest.raises(ShapeError, match=r"(?s)several dims of xs may be the tokens.*batch_dims="):
        ops.recurrent(blind, STATE, rows(4, 3, 3))
    one = fm.state(h="", dtype=torch.float64)
    with pytest.raises(ShapeError, match="segment_ids"):
        ops.recurrent(leaky, STATE, rows(4, 3), segment_ids=torch.zeros(5))
    assert ops.recurrent(leaky, one, rows(4)).shape == (4,)


def test_declarations():
    with pytest.raises(DeclarationError, match='axis "key" of the state "S" has no valid size'):
        fm.state(S="heads key", dtype=torch.float32, heads=2)
    with pytest.raises(DeclarationError, match='axis "value" of a state has no tensor'):
        fm.state(S="heads", dtype=torch.float32, heads=2, value=3)
    with pytest.raises(DeclarationError, match="dtype by name of other tensors"):
        fm.state(S="heads", dtype={"T": torch.float32}, heads=2)


# --- fm.check_recurrence -------------------------------------------------------------------------


def linear_inputs(seq=20):
    decay = -torch.rand((seq, 2), generator=torch.Generator().manual_seed(4)).double()
    return {"q": rows(seq, 2, 4), "k": rows(seq, 2, 4, seed=1), "v": rows(seq, 2, 3), "g": decay}


def test_check_recurrence():
    state = memory(2, 4, 3)
    assert fm.check_recurrence(linear_step, linear_chunked, state, linear_inputs()) < 1e-12


@pytest.mark.parametrize("fault", ["state", "within", "gradient"])
def test_check_recurrence_sees_faults(fault):
    def wrong(state, x):
        if fault == "state":
            after, y = linear_chunked(state, x)
            return {"S": after["S"] * 1.001}, y
        if fault == "within":
            return linear_chunked(state, x | {"k": x["k"].roll(1, dims=-3)})
        return linear_chunked({"S": state["S"].detach()}, x)

    with pytest.raises(fm.errors.FuncModelsError, match="wrong is not its step"):
        fm.check_recurrence(linear_step, wrong, memory(2, 4, 3), linear_inputs())


def counted(state, x):
    """As a served model has to write it: casts to the state's dtypes. It keeps several kinds."""
    n, x = state["n"] + 1, x.float()
    h = state["h"] * 0.9j + x
    last = x.to(state["last"].dtype)
    return {"h": h, "n": n, "last": last}, {"h": h.real / n.float(), "was": state["last"] + 0}


def counted_chunk(state, x, fault=None):
    x = x.to(torch.float32)
    at = torch.arange(1, x.shape[-2] + 1, dtype=torch.float32)[:, None]
    within = (at - at.mT).tril()
    weight = torch.polar(0.9**within, torch.pi / 2 * within).tril()
    h = (
        weight @ x.to(torch.complex64)
        + torch.polar(0.9**at, torch.pi / 2 * at) * state["h"][..., None, :]
    )
    n = state["n"][..., None, :] + at.to(torch.int64)
    was = torch.cat([state["last"][..., None, :], x[..., :-1, :]], -2)
    was = was * (1 + 1e-6) if fault == "was" else was
    last = x[..., -1, :] if fault != "last" else x[..., 0, :]
    after = {"h": h[..., -1, :], "n": n[..., -1, :] + (fault == "n"), "last": last}
    y = {"was": was, "h": h.real / n.to(torch.float32)}
    return after, (y | {"more": was} if fault == "more" else y)


@pytest.mark.parametrize("fault", [None, "was", "last", "n", "more"])
def test_check_recurrence_of_states_of_several_dtypes(fault):
    """Casts round nothing there, whole numbers stay whole, and faults are seen all the same."""
    dtypes = {"h": torch.complex64, "n": torch.int64, "last": torch.bfloat16}
    state = fm.state(h="hidden", n="hidden", last="hidden", dtype=dtypes, hidden=3)
    chunk = functools.partial(counted_chunk, fault=fault)
    if fault is None:
        assert fm.check_recurrence(counted, chunk, state, rows(20, 3).float()) < 1e-12
        return
    with pytest.raises(fm.errors.FuncModelsError, match="counted_chunk is not its step") as error:
        fm.check_recurrence(counted, chunk, state, rows(20, 3).float())
    lines = r"(?s)step: +test_recurrent.py:\d+ in counted\n.* in counted_chunk"
    assert re.search(lines, str(error.value))
    assert torch.get_default_dtype() == torch.float32


# --- ops.associative_scan ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
def test_associative_scan(n):
    a, b = rows(2, n, 3), rows(2, n, 3, seed=1)

    def combine(first, second):
        (a1, b1), (a2, b2) = first, second
        return a1 * a2, a2 * b1 + b2

    def h(a, b):
        return ops.associative_scan(combine, (a, b), dim=1)[1]

    def loop(a, b):
        out = [b[:, 0]]
        for t in range(1, n):
            out.append(a[:, t] * out[-1] + b[:, t])
        return torch.stack(out, 1)

    torch.testing.assert_close(h(a, b), loop(a, b), rtol=0, atol=1e-12)
    tangents = (rows(2, n, 3, seed=2), rows(2, n, 3, seed=3))
    got, want = (torch.func.jvp(f, (a, b), tangents) for f in (h, loop))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    got = torch.func.vmap(h, in_dims=(2, 2), out_dims=2)(a, b)
    torch.testing.assert_close(got, loop(a, b), rtol=0, atol=1e-12)
    got, want = (torch.func.grad(lambda a, f=f: (f(a, b) ** 2).sum())(a) for f in (h, loop))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_what_an_associative_scan_refuses():
    with pytest.raises(
        ShapeError, match=r"(?s)leaves of several lengths.*got: +0 5 along dim 0, 1 4"
    ):
        ops.associative_scan(lambda a, b: a, (torch.ones(5), torch.ones(4)), dim=0)

    def forgets(first, second):
        return first[0]

    with pytest.raises(ShapeError, match=r"(?s)forgets combines to something else.*in forgets"):
        ops.associative_scan(forgets, (torch.ones(5), torch.ones(5)), dim=0)


def test_what_a_step_must_not_return():
    """And torch's own errors say which shapes a step was given."""

    def without(state, x):
        return state, {"a": x + state["h"], "b": None}

    def number(state, x):
        return {"h": 1.0}, x

    def shared(state, x):
        return {"h": state["h"] + x}, torch.ones(3).double()

    ids = torch.zeros(2, 4)
    with pytest.raises(ShapeError, match=r"(?s)a result is no tensor.*b is None.*in without"):
        ops.recurrent(without, STATE, rows(2, 4, 3), segment_ids=ids)
    with pytest.raises(ShapeError, match=r'(?s)no tensor as the state "h".*got: +1.0.*in number'):
        ops.recurrent(number, STATE, rows(2, 4, 3), segment_ids=ids)
    with pytest.raises(ShapeError, match='no tensor as the state "h"'):
        ops.recurrent(number, STATE, rows(4, 3))
    with pytest.raises(ShapeError, match=r"(?s)another number of sequences.*y \(3\).*in shared"):
        ops.recurrent(shared, STATE, rows(2, 4, 3), segment_ids=ids)
    for given in ({}, {"segment_ids": ids}):
        with pytest.raises(RuntimeError, match=r"Mismatching|must match") as error:
            ops.recurrent(leaky, STATE, rows(2, 4, 5), **given)
        notes = "\n".join(error.value.__notes__)
        assert re.search(r"in: leaky of ops.recurrent, test_recurrent.py:\d+", notes)
        assert re.search(r"a state of h \(3,\), .*xs x \(2, 4, 5\)", notes)
