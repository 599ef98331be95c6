"""Recurrences in the compiler: recorded once, cut over ranks, and refused where a line is wrong."""

import functools
import re

import pytest
import torch
from einops import einsum

import funcmodels as fm
from compiler.check import check_needs
from compiler.comm import Simulated
from compiler.compare_forms import check_forms
from compiler.evaluate import local_weights, run
from compiler.partition import partition
from compiler.placement import Shard
from compiler.recurrence import recurrence
from compiler.tokens_apart import check_tokens_apart
from compiler.trace import trace
from funcmodels import ops
from funcmodels.check_recurrence import RecurrenceError
from funcmodels.errors import (
    DeclarationError,
    LoweringError,
    ShapeError,
    ShardingError,
    TraceError,
)
from tests.engine.recurrences import recurrent_model

KINDS = ["linear", "delta", "by_key", "own", "scanned", "conv"]


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_partitioned_equals_the_function(kind, batched, segments):
    model = recurrent_model(kind)
    weights = fm.init(model, seed=0, dtype=torch.float64)
    program = trace(model, batched=batched, segments=segments)
    shape = (2, 75) if batched else (75,)
    tokens = torch.randint(256, shape, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(75).expand(shape)
    ids = (positions // 20) if segments else None
    want = model.forward(weights, tokens, positions, ids)
    local = partition(program)
    assert not local.gathered
    for tp in (1, 2, 4):
        comm = Simulated(tp)
        parts = local_weights(local, weights, comm)
        for logits in run(local, parts, tokens, positions, comm, segment_ids=ids):
            torch.testing.assert_close(logits, want, rtol=0, atol=2e-6)  # states are float32


@pytest.mark.parametrize("remat", [False, True])
def test_remat_is_recorded(remat):
    """A compiled model keeps the states between chunks alone, where the model asks for that."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        v = einsum(x, params["v"], "... e, h d e -> ... h d")
        g = -v.square().mean(-1)
        y = ops.gated_linear_attention(v, v, v, g, segment_ids=segment_ids, remat=remat)
        return ops.unembed(einsum(y, params["o"], "... h d, e h d -> ... e"), params["embed"])

    model = model_of(None, forward=forward)
    module = fm.compile_to_torch(model).reset(seed=0)
    tokens = torch.arange(256)[None] % 16
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logits = module(tokens, torch.arange(256)[None])
    of_chunks = 4 * 2 * 64 * 64  # bytes of one matrix of scores in each of four chunks
    assert (sum(kept.values()) > 4 * of_chunks) is not remat
    weights = fm.tree.map(torch.Tensor.detach, module.weights())
    want = fm.grad_and_value(lambda w: model.forward(w, tokens, positions_of(tokens)).sum())(
        weights
    )
    logits.sum().backward()
    for (path, grad), p in zip(fm.tree.items(want[0]), module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5, msg=path)


def positions_of(tokens):
    return torch.arange(tokens.shape[-1]).expand(tokens.shape)


def test_a_block_is_recorded_once():
    program = trace(recurrent_model("delta", "delta", "delta"))
    nodes = [n for b in program.all() for n in b.graph.nodes if n.target is recurrence]
    assert len(nodes) == 1


def decayed(rate):
    def step(state, x):
        S = rate * state["S"] + x
        return {"S": S}, S

    return step


def test_steps_of_one_name_are_several():
    """Of the same shapes, too: each recurrence keeps its own."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        y = einsum(x, params["v"], "... e, h d e -> ... h d")
        for rate in (0.5, 0.9):
            state = fm.state(S="heads value", dtype=y.dtype, heads=2, value=4)
            y = ops.recurrent(decayed(rate), state, y, segment_ids=segment_ids)
        return ops.unembed(einsum(y, params["o"], "... h d, e h d -> ... e"), params["embed"])

    model = model_of(None, forward=forward)
    weights = fm.init(model, seed=0)
    tokens = torch.arange(12) % 16
    local = partition(trace(model))
    for tp in (1, 2):
        comm = Simulated(tp)
        parts = local_weights(local, weights, comm)
        for logits in run(local, parts, tokens, torch.arange(12), comm):
            want = model.forward(weights, tokens, torch.arange(12))
            torch.testing.assert_close(logits, want)


P = fm.axes(vocab=16, hidden=8, heads=2, value=4)


def model_of(step, sharding=("heads",), forward=None):
    """A model of one recurrence over (heads, value)."""

    def with_step(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        v = einsum(x, params["v"], "... e, h d e -> ... h d")
        state = fm.state(S="heads value", dtype=v.dtype, heads=2, value=4)
        y = ops.recurrent(step, state, v, segment_ids=segment_ids)
        return ops.unembed(einsum(y, params["o"], "... h d, e h d -> ... e"), params["embed"])

    params = {
        "embed": P("vocab hidden"),
        "v": P("heads value hidden"),
        "o": P("hidden heads value"),
    }
    table = dict.fromkeys(sharding, "tp")
    given = forward or with_step
    return fm.Model("Step", config={}, params=params, forward=given, sharding=table)


def summed(state, x):
    """Two states, and two results."""
    a, b = state["a"] + x, state["b"] - 2 * x
    return {"b": b, "a": a}, {"p": a, "q": b}


def summed_at_once(state, x, order="qp", rows=None, dtype=None):
    a = state["a"][..., None, :, :] + x.cumsum(-3)
    b = state["b"][..., None, :, :] - 2 * x.cumsum(-3)
    y = {"p": a[..., :rows, :, :], "q": b.to(dtype or b.dtype)}
    return {"b": b[..., -1, :, :], "a": a[..., -1, :, :]}, {name: y[name] for name in order}


def model_of_two(chunked):
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        v = einsum(x, params["v"], "... e, h d e -> ... h d")
        state = fm.state(a="heads value", b="heads value", dtype=v.dtype, heads=2, value=4)
        y = ops.recurrent(summed, state, v, chunked=chunked, chunk=4, segment_ids=segment_ids)
        y = y["p"] - 3 * y["q"]
        return ops.unembed(einsum(y, params["o"], "... h d, e h d -> ... e"), params["embed"])

    return model_of(None, forward=forward)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("chunked", [None, summed_at_once])
def test_states_and_results_go_by_name(chunked, batched):
    """Whatever order a step and its chunked form return them in."""
    model = model_of_two(chunked)
    weights = fm.init(model, seed=0)
    tokens = torch.arange(12) % 16
    tokens = tokens[None] if batched else tokens
    want = model.forward(weights, tokens, positions_of(tokens))
    program = partition(trace(model, batched=batched))
    [got] = run(program, {p: [w] for p, w in fm.tree.items(weights)}, tokens, positions_of(tokens))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"order": "p"}, r"returns another y than summed\n  got: +p\n  need: +p, q"),
        ({"rows": 1}, r"a result of a chunk has another number of tokens\n  got: +p \(.*1, 2, 4\)"),
        ({"dtype": torch.float64}, r"returns another dtype or shape than .*\n  got: +q .*float64"),
    ],
)
def test_results_of_a_chunk_that_are_not_those_of_the_step(fault, message, batched):
    def wrong(state, x):
        return summed_at_once(state, x, **fault)

    with pytest.raises(ShapeError, match=message) as error:
        trace(model_of_two(wrong), batched=batched)
    assert re.search(r"from: +test_recurrence.py:\d+ in wrong", str(error.value))


@pytest.mark.parametrize("fault", ["results", "state"])
def test_verify_compares_both_forms(fault):
    """Served, a prompt is read by the chunked form and what follows by the step."""

    def wrong(state, x):
        after, y = summed_at_once(state, x)
        if fault == "results":
            return after, {"p": x, "q": x}
        return {"a": after["a"], "b": state["b"]}, y

    model = model_of_two(wrong)
    with pytest.raises(RecurrenceError, match="wrong is not its step: prompts") as error:
        fm.verify(model, fm.init(model, seed=0), [[1, 5, 9], [4]])
    lines = r"(?s)step: +test_recurrence.py:\d+ in summed\n.*from: +test_recurrence.py:\d+ in wrong"
    assert re.search(lines, str(error.value))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "own"])
def test_right_forms_are_not_refused(kind):
    """Which cast to float32, and have states of it."""
    model = recurrent_model(kind)
    check_forms(trace(model), fm.init(model, seed=0), [[1, 5, 9], [4]])


def test_a_state_without_its_sequences_is_refused():
    """In the engine, it would be one for all requests."""

    def wrong(state, x):
        return {"S": torch.zeros(2, 4, dtype=x.dtype)}, x

    with pytest.raises(ShapeError, match=r'wrong changes the shape of the state "S"'):
        trace(model_of(wrong))


def test_a_state_and_an_x_of_two_dtypes():
    """A product of both is refused, with the line; what torch promotes is computed."""

    def product(state, x):
        S = 0.9 * state["S"] + x
        y = einsum(S, x, "... h v, ... h v -> ... h")
        return {"S": S}, y[..., None] * x

    def forward(params, tokens, positions, segment_ids=None, step=product):
        x = ops.embed(tokens, params["embed"])
        v = einsum(x, params["v"], "... e, h d e -> ... h d")
        state = fm.state(S="heads value", dtype=torch.float32, heads=2, value=4)
        y = ops.recurrent(step, state, v, segment_ids=segment_ids).to(x.dtype)
        return ops.unembed(einsum(y, params["o"], "... h d, e h d -> ... e"), params["embed"])

    with pytest.raises(TraceError, match=r"einsum of tensors of two dtypes") as error:
        trace(model_of(None, forward=forward))
    assert re.search(r"got: +torch.float32 and the model's dtype", str(error.value))
    assert re.search(
        r"(?s)from: +test_recurrence.py:\d+ in product.*x\.float\(\)", str(error.value)
    )
    trace(model_of(None, forward=functools.partial(forward, step=decayed(0.5))))


def added(first, second):
    return first + second


def mixed_with(combine, within=True):
    """A model of running results by `combine`, within a chunked form or by themselves."""

    def scanned(state, x):
        S = state["S"][..., None, :, :] + ops.associative_scan(combine, x, dim=-3)
        return {"S": S[..., -1, :, :]}, S

    def summed(state, x):
        S = state["S"] + x
        return {"S": S}, S

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        v = einsum(x, params["v"], "... e, h d e -> ... h d")
        state = fm.state(S="heads value", dtype=v.dtype, heads=2, value=4)
        y = (
            ops.recurrent(summed, state, v, chunked=scanned, segment_ids=segment_ids)
            if within
            else ops.associative_scan(combine, v, dim=-3)
        )
        return ops.unembed(einsum(y, params["o"], "... h d, e h d -> ... e"), params["embed"])

    return model_of(None, forward=forward)


def test_a_scan_over_the_models_tokens():
    """Of rows it is computed; the engine's tokens are of many requests, of which it knows none."""
    model = mixed_with(added, within=False)
    weights = fm.init(model, seed=0)
    tokens = torch.arange(24).reshape(2, 12) % 16
    want = model.forward(weights, tokens, positions_of(tokens))
    local = partition(trace(model, batched=True))
    assert not local.gathered
    for tp in (1, 2):
        comm = Simulated(tp)
        parts = local_weights(local, weights, comm)
        for logits in run(local, parts, tokens, positions_of(tokens), comm):
            torch.testing.assert_close(logits, want)
    module = fm.compile_to_torch(model).reset(seed=0)
    logits = module(tokens, positions_of(tokens))
    weights = fm.tree.map(torch.Tensor.detach, module.weights())
    torch.testing.assert_close(logits, model.forward(weights, tokens, positions_of(tokens)))
    with pytest.raises(
        LoweringError, match=r"(?s)over the model's tokens.*ops\.recurrent"
    ) as error:
        check_tokens_apart(trace(model))
    assert re.search(r"from: +test_recurrence.py:\d+ in forward", str(error.value))


def test_a_scan_that_mixes_heads_is_gathered():
    def over_heads(first, second):
        return first + second - 0 * first.mean(-2, keepdim=True)

    model = mixed_with(over_heads)
    local = partition(trace(model))
    assert [g.operation for g in local.gathered] == ["recurrence"]
    weights = fm.init(model, seed=0)
    tokens, positions = torch.arange(12), torch.arange(12)
    want = model.forward(weights, tokens, positions)
    comm = Simulated(2)
    for logits in run(local, local_weights(local, weights, comm), tokens, positions, comm):
        torch.testing.assert_close(logits, want)


def test_a_combination_of_another_shape_is_refused():
    def summed(first, second):
        return (first + second).sum(-1)

    with pytest.raises(ShapeError, match="summed combines to something else") as error:
        trace(mixed_with(summed))
    assert re.search(r"from: +test_recurrence.py:\d+ in summed", str(error.value))


def test_a_block_within_a_step_is_part_of_it():
    """A step has no modules: it is one."""

    @fm.block
    def half(x):
        return 0.5 * x

    def step(state, x):
        S = half(state["S"]) + x
        return {"S": S}, S

    assert [block.name for block in trace(model_of(step)).all()] == ["forward"]


def with_memory(mem, sharding=("mem",)):
    """A model of a state that has an axis of its own."""
    axes = fm.axes(vocab=16, hidden=8, mem=mem)

    def step(state, x):
        S = 0.9 * state["S"] + x[..., None]
        return {"S": S}, S

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        state = fm.state(S="hidden mem", dtype=x.dtype, hidden=8, mem=mem)
        y = ops.recurrent(step, state, x, segment_ids=segment_ids)
        return ops.unembed(y.square().sum(-1), params["embed"])

    params = {"embed": axes("vocab hidden")}
    table = dict.fromkeys(sharding, "tp")
    return fm.Model("Memory", config={}, params=params, forward=forward, sharding=table)


def test_an_axis_that_only_a_state_has():
    """It is cut by the table, and where ranks do not divide it, its line is named."""
    model = with_memory(4)
    local = partition(trace(model))
    [node] = [n for n in local.root.graph.nodes if n.target is recurrence]
    assert node.kwargs["recurrence"].placements == (Shard(1, 4, "mem"),)
    weights = fm.init(model, seed=0)
    tokens, positions = torch.arange(12), torch.arange(12)
    comm = Simulated(2)
    for logits in run(local, local_weights(local, weights, comm), tokens, positions, comm):
        torch.testing.assert_close(logits, model.forward(weights, tokens, positions))
    check_needs(model, local.needs, 2)
    three = with_memory(3)
    with pytest.raises(ShardingError, match='cannot split axis "mem"') as error:
        check_needs(three, partition(trace(three)).needs, 2)
    lines = r'(?s)got: +mem=3, tp=2\n.*from: +the state "S", test_recurrence.py:\d+ in forward'
    assert re.search(lines, str(error.value))
    with pytest.raises(DeclarationError, match='an axis that is not declared: "memory"'):
        with_memory(4, sharding=("memory",))


def over_heads(state, x):
    """A step that mixes heads: it cannot be cut by them."""
    S = state["S"] + x - x.mean(-2, keepdim=True)
    return {"S": S}, S


def test_a_step_that_mixes_heads_is_gathered():
    model = model_of(over_heads)
    local = partition(trace(model))
    assert [g.operation for g in local.gathered] == ["recurrence"]
    weights = fm.init(model, seed=0)
    tokens, positions = torch.arange(12), torch.arange(12)
    want = model.forward(weights, tokens, positions)
    comm = Simulated(2)
    for logits in run(local, local_weights(local, weights, comm), tokens, positions, comm):
        torch.testing.assert_close(logits, want)
    with pytest.raises(LoweringError, match="no sharding rule for recurrence"):
        partition(trace(model), strict=True)


def across_sequences(state, x):
    S = state["S"] + x - x.mean(0, keepdim=True)
    return {"S": S}, S


def test_a_step_that_mixes_sequences_is_refused():
    message = r"across_sequences makes sequences depend on each other: torch\.mean"
    with pytest.raises(LoweringError, match=message) as error:
        check_tokens_apart(trace(model_of(across_sequences)))
    assert re.search(r"from: +test_recurrence.py:\d+ in across_sequences", str(error.value))


def inverse(state, x):
    """Of a matrix of each head's own: an operation of which no rule knows that."""
    S = state["S"] + einsum(x, x, "... h a, ... h b -> ... h a b")
    return {"S": S}, torch.cholesky_inverse(S + 4 * torch.eye(4))[..., 0]


def turned(state, x):
    h = state["S"] * (0.6 + 0.5j) + x
    return {"S": h}, h.real


def between_sequences(state, x):
    S = torch.cholesky_inverse(state["S"] + x[0, ..., None] * 0 + torch.eye(4))
    return {"S": S + S.roll(1, 0)}, x


def stateful(step, dtype, axes="heads value key"):
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        v = einsum(x, params["v"], "... e, h d e -> ... h d").float()
        sizes = {axis: {"heads": 2, "value": 4, "key": 4}[axis] for axis in axes.split()}
        state = fm.state(S=axes, dtype=dtype, **sizes)
        y = ops.recurrent(step, state, v, segment_ids=segment_ids).to(x.dtype)
        return ops.unembed(einsum(y, params["o"], "... h d, e h d -> ... e"), params["embed"])

    return model_of(None, forward=forward)


@pytest.mark.parametrize(
    ("step", "dtype", "axes"),
    [
        (inverse, torch.float32, "heads value key"),
        (turned, torch.complex64, "heads value"),
    ],
)
def test_operations_without_a_rule_are_tried(step, dtype, axes):
    model = stateful(step, dtype, axes)
    program = trace(model)
    check_tokens_apart(program)
    weights = fm.init(model, seed=0)
    tokens, positions = torch.arange(12), torch.arange(12)
    local, comm = partition(program), Simulated(2)
    for logits in run(local, local_weights(local, weights, comm), tokens, positions, comm):
        torch.testing.assert_close(logits, model.forward(weights, tokens, positions))


def test_operations_without_a_rule_that_mix_sequences_are_refused():
    message = r"torch\.cholesky_inverse in the step between_sequences is not known"
    with pytest.raises(LoweringError, match=message) as error:
        check_tokens_apart(trace(stateful(between_sequences, torch.float32)))
    assert re.search(r"from: +test_recurrence.py:\d+ in between_sequences", str(error.value))


def test_an_x_that_is_not_of_tokens_is_refused():
    def step(state, x):
        return {"S": state["S"] + x["v"] * x["w"]}, state["S"]

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        state = fm.state(S="hidden", dtype=x.dtype, hidden=8)
        y = ops.recurrent(step, state, {"v": x, "w": params["w"]})
        return ops.unembed(y, params["embed"])

    params = {"embed": P("vocab hidden"), "w": P("hidden")}
    model = fm.Model("Step", config={}, params=params, forward=forward, sharding={})
    with pytest.raises(TraceError, match=r"has an x that is not of the model's tokens"):
        trace(model)


@pytest.mark.parametrize("tp", [1, 2])
def test_explain_counts_states(tp, tmp_path):
    """Of each sequence: (heads, key, value) and two of (heads, value) in float32, a window."""
    found = fm.explain(recurrent_model("conv", "delta", "attention", "own"), tp=tp)
    want = 64 * 3 * 2 + 4 * 8 * 16 * 4 + 2 * 4 * 16 * 4
    assert found.state_per_sequence == want // tp
    assert found.to_dict()["state_per_sequence"] == want // tp
    assert "state/sequence" in str(found)
    assert "a sequence, however long" in found.to_html(tmp_path / "page.html").read_text()


def test_explain_counts_no_states_where_there_are_none():
    without = fm.explain(recurrent_model("attention"))
    assert without.state_per_sequence == 0
    assert "state/sequence" not in str(without)
