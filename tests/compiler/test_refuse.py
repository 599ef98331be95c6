"""What a model function must not do: each is refused, with the user's line and a fix.

Each function here would be silently wrong if it were recorded: frozen to what tracing saw.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._higher_order_ops.scan import scan
from torch.nn.functional import silu

import funcmodels as fm
from compiler.partition import check_tokens_apart, partition
from compiler.trace import trace
from compiler.vllm_target import source_for_vllm
from funcmodels import ops
from funcmodels.errors import LoweringError, ShapeError, TraceError
from tests.compiler.programs import axes, check_on_ranks, evaluated, inputs_of, small, weights_of

P = axes()
A_TENSOR = torch.ones(16)
PARAMS = {"w": P("hidden"), "m": P("mlp hidden"), "layers": [{"w": P("hidden")} for _ in range(3)]}


def model_of(body: Any, outer: bool = False) -> fm.Model:
    """embed -> body -> unembed; with `outer`, the body is the whole forward."""

    def forward(params, tokens, positions, segment_ids=None):
        if outer:
            return body(params, tokens, positions)
        x = ops.embed(tokens, params["embed"])
        return ops.unembed(body(params, x, positions), params["head"])

    return small(forward, PARAMS)


def refused(body: Any, match: str, fix: str, line: str | None = None, outer: bool = False) -> None:
    """Tracing raises, saying `match`, the fix, and the line of the body that holds `line`."""
    with pytest.raises(TraceError, match=match) as error:
        trace(model_of(body, outer))
    assert re.search(fix, error.value.lines["fix"]), error.value
    if line is not None:
        source, first = inspect.getsourcelines(body)
        number = first + next(i for i, text in enumerate(source) if line in text)
        assert str(error.value.lines["from"]).startswith(f"test_refuse.py:{number} in "), (
            error.value
        )


# A result that is no logits


@pytest.mark.parametrize(
    ("body", "got"),
    [
        (lambda p, t, s: t, r"\(num_tokens\) of int64"),
        (lambda p, t, s: None, "NoneType"),
        (lambda p, t, s: (ops.embed(t, p["embed"]),), "tuple"),
        (lambda p, t, s: {"logits": ops.embed(t, p["embed"])}, "dict"),
        (lambda p, t, s: p["embed"], r"\(24, 16\) of float16"),
        (lambda p, t, s: ops.embed(t, p["embed"])[-1], r"\(16\) of float16"),
        (lambda p, t, s: ops.embed(t, p["embed"])[None], r"\(1, num_tokens, 16\)"),
        (lambda p, t, s: ops.embed(t, p["embed"]).T, r"\(16, num_tokens\)"),
        (lambda p, t, s: ops.embed(t, p["embed"]).argmax(-1), r"\(num_tokens\) of int64"),
        (lambda p, t, s: ops.embed(t, p["embed"]).long(), r"\(num_tokens, 16\) of int64"),
    ],
)
def test_wrong_result(body, got):
    with pytest.raises(TraceError, match="forward does not return logits") as error:
        trace(model_of(body, outer=True))
    assert re.search(got, error.value.lines["got"])
    assert "ops.unembed(x, params['head'])" in error.value.lines["fix"]
    assert "test_refuse.py" in str(error.value.lines["from"])


def test_wrong_result_of_a_partial():
    def forward(params, tokens, positions, segment_ids=None, *, scale):
        return tokens * scale

    with pytest.raises(TraceError, match="forward does not return logits") as error:
        trace(small(functools.partial(forward, scale=2)))
    assert str(error.value.lines["from"]).endswith("in forward")


# Writes


@fm.block
def writes_parameter(p, x):
    p["w"].mul_(2)
    return x * p["w"]


@fm.block
def assigns_parameter(p, x):
    p["w"] = p["w"] * 2
    return x * p["w"]


@fm.block
def multiplies_parameter_in_place(p, x):
    p["w"] *= 2
    return x * p["w"]


@fm.block
def appends(p, x, seen):
    seen.append(x)
    return x * p["w"]


def test_a_block_writes_into_a_parameter():
    refused(
        lambda p, x, s: writes_parameter(p["layers"][0], x), "mul_ writes into a tensor", "x.mul"
    )


def test_the_line_of_a_write_is_the_blocks():
    with pytest.raises(TraceError) as error:
        trace(model_of(lambda p, x, s: writes_parameter(p["layers"][0], x)))
    line = inspect.getsourcelines(writes_parameter.__wrapped__)[1] + 2
    assert str(error.value.lines["from"]) == f"test_refuse.py:{line} in writes_parameter"


def test_a_block_assigns_to_its_parameters():
    refused(
        lambda p, x, s: assigns_parameter(p["layers"][0], x),
        "assigns_parameter changes the parameters it was given",
        "bind the new value to a local name",
    )


def test_a_block_multiplies_a_parameter_in_place():
    refused(
        lambda p, x, s: multiplies_parameter_in_place(p["layers"][0], x),
        "mul_ writes into",
        "x.mul",
    )


def test_a_block_appends_to_a_list_it_was_given():
    refused(lambda p, x, s: appends(p["layers"][0], x, []), "appends changes", "local name")


def set_item(p, x, s):
    y = x * 1
    y[0] = 1
    return y


def set_column(p, x, s):
    y = x * 1
    y[..., 0] = 1
    return y


def in_place_on_temporary(p, x, s):
    y = x * 1
    y.add_(1)
    return y


def augmented(p, x, s):
    x += p["w"]
    return x


def augmented_power(p, x, s):
    y = x * 1
    y **= 2
    return y


def augmented_and(p, x, s):
    mask = s > 1
    mask &= s > 2
    return x * mask[..., None]


def out_argument(p, x, s):
    y = x * 1
    torch.mul(x, 2, out=y)
    return y


def inplace_flag(p, x, s):
    y = x * 1
    F.relu(y, inplace=True)
    return y


def inplace_flag_by_position(p, x, s):
    y = x * 1
    silu(y, True)
    return y


def copies_into(p, x, s):
    y = torch.zeros_like(x)
    y.copy_(x)
    return y


def sets_data(p, x, s):
    y = x * 1
    y.data = x
    return y


@pytest.mark.parametrize(
    ("body", "match", "fix", "line"),
    [
        (set_item, "__setitem__ writes", "torch.where", "y[0] = 1"),
        (set_column, "__setitem__ writes", "torch.cat", "y[..., 0] = 1"),
        (in_place_on_temporary, "add_ writes", r"x = x\.add\(", "y.add_(1)"),
        (augmented, "add_ writes", r"x = x\.add\(", "x += "),
        (augmented_power, "pow_ writes", r"x = x\.pow\(", "y **= 2"),
        (augmented_and, "__iand__ writes", "bind the result", "mask &= "),
        (out_argument, "out= writes", "leave out= out", "out=y"),
        (inplace_flag, "inplace= writes", "leave inplace= out", "inplace=True"),
        (inplace_flag_by_position, "inplace= writes", "leave inplace= out", "silu(y, True)"),
        (copies_into, "copy_ writes", "bind the result", "y.copy_"),
        (sets_data, "__set__ writes", "make a new tensor", "y.data = x"),
    ],
)
def test_writes(body, match, fix, line):
    refused(body, match, fix, line)


def assigns(p, x, s):
    p["w"] = p["w"] * 2
    return x


def appends_to_layers(p, x, s):
    p["layers"].append(p["layers"][0])
    return x


def pops_layer(p, x, s):
    p["layers"].pop()
    return x


def adds_key(p, x, s):
    p["layers"][0]["z"] = x
    return x


@pytest.mark.parametrize("body", [assigns, appends_to_layers, pops_layer, adds_key])
def test_changed_tree(body):
    refused(body, "forward changes the parameters it was given", "local name")


# Randomness, and memory as it happens to be


def draws(p, x, s):
    return x + torch.rand(16)


def draws_like(p, x, s):
    return x + torch.randn_like(x)


def draws_from_generator(p, x, s):
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def drops_out(p, x, s):
    return F.dropout(x, 0.1)


def drops_out_in_attention(p, x, s):
    return F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.1)[0]


def bernoulli(p, x, s):
    return x * torch.bernoulli(x.sigmoid())


def fills_randomly(p, x, s):
    return x + torch.zeros(16).uniform_()


def module_with_state(p, x, s):
    return torch.nn.Linear(16, 16)(x)


def uninitialised(p, x, s):
    return x * 0 + torch.empty(16)


def uninitialised_like(p, x, s):
    return x * 0 + torch.empty_like(x)


@pytest.mark.parametrize(
    ("body", "match", "fix"),
    [
        (draws, "torch.rand draws random numbers", "take the noise as an argument"),
        (draws_like, "torch.randn_like draws", "take the noise"),
        (draws_from_generator, "torch.randn draws", "take the noise"),
        (drops_out, "torch.dropout draws", "serving never drops out"),
        (drops_out_in_attention, "scaled_dot_product_attention draws", "never drops out"),
        (bernoulli, "torch.bernoulli draws", "take the noise"),
        (fills_randomly, "uniform_ writes", "bind the result"),
        (module_with_state, "torch.empty gives whatever", "torch.zeros"),
        (uninitialised, "torch.empty gives whatever the memory held", "torch.zeros"),
        (uninitialised_like, "torch.empty_like gives", "torch.zeros_like"),
    ],
)
def test_not_a_function_of_the_arguments(body, match, fix):
    refused(body, match, fix, "return")


def draws_in_python(p, x, s):
    return x * random.random()


def draws_in_numpy(p, x, s):
    return x * float(np.random.rand())


@fm.block
def draws_in_a_block(p, x):
    return x * p["w"] * random.choice([1.0, 2.0])


def calls_what_draws(p, x, s):
    return draws_in_a_block(p["layers"][0], x)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (draws_in_python, "forward draws random numbers from random"),
        (draws_in_numpy, r"forward draws random numbers from numpy\.random"),
        (calls_what_draws, "draws_in_a_block draws random numbers from random"),
    ],
)
def test_numbers_drawn_in_python(body, match):
    refused(body, match, "config field")


def reads_numpy(p, x, s):
    return x * p["w"].detach().numpy()


def reads_by_array(p, x, s):
    return x * np.asarray(p["w"])


def masked_select(p, x, s):
    return x + torch.masked_select(x, x > 0).sum()


def reads_shape_of_values(p, x, s):
    return x + torch.nonzero(x).shape[0]


def asserts_on_value(p, x, s):
    assert (x > 0).all()
    return x


def loops_on_value(p, x, s):
    while x.norm() > 1:
        x = x / 2
    return x


@pytest.mark.parametrize(
    "body",
    [reads_numpy, reads_by_array, masked_select, reads_shape_of_values, asserts_on_value,
     loops_on_value],
)  # fmt: skip
def test_reads_values_in_other_ways(body):
    refused(body, "needs the value of a tensor|from outside the function", "torch.where|P")


# Python that needs what is not known


def branches_on_value(p, x, s):
    if x.sum() > 0:
        return x
    return -x


def reads_item(p, x, s):
    return x * s.max().item()


def reads_int(p, x, s):
    return x * int(s.max())


def reads_float(p, x, s):
    return x * float(p["w"].sum())


def reads_list(p, x, s):
    return x * p["w"].tolist()[0]


def masks(p, x, s):
    return x * x[s > 3].sum(0)


def hides_refusal(p, x, s):
    try:
        return x if x.sum() > 0 else -x
    except Exception:
        return x * 2


@pytest.mark.parametrize(
    "body",
    [branches_on_value, reads_item, reads_int, reads_float, reads_list, masks, hides_refusal],
)
def test_needs_a_value(body):
    refused(body, "needs the value of a tensor", r"torch.where\(condition, a, b\)")


def scans_layers(p, x, s):
    stacked = torch.stack([layer["w"] for layer in p["layers"]])
    return scan(lambda c, w: (c * w, c.sum()), x, stacked)[0]


def chooses(p, x, s):
    return torch.cond(p["w"].sum() > 0, lambda y: y * 2, lambda y: -y, (x,))


@pytest.mark.parametrize(("body", "line"), [(scans_layers, "return scan"), (chooses, "torch.cond")])
def test_functions_given_to_torch(body, line):
    refused(body, "is given a function", "a Python loop", line)


def test_errors_without_a_line_are_given_one():
    """Those of our ops, and torch's own."""
    with pytest.raises(ShapeError, match="unembed") as error:
        trace(model_of(lambda p, x, s: x[..., :3]))
    assert "test_refuse.py" in str(error.value)
    with pytest.raises(RuntimeError) as other:
        trace(model_of(lambda p, x, s: x + x @ p["m"].T))
    assert "test_refuse.py" in other.value.__notes__[0]


def branches_on_tokens(p, x, s):
    if x.shape[0] > 128:
        return x
    return -x


def branches_on_tokens_at_the_end(p, x, s):
    y = x * 2
    return y if y.size(0) > 128 else -y


def clips_tokens(p, x, s):
    return x * min(x.shape[0], 64)


def root_of_tokens(p, x, s):
    return x / math.sqrt(x.shape[0])


def counts_tokens(p, x, s):
    for _ in range(x.shape[0]):
        x = x + 1
    return x


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (branches_on_tokens, "if x.shape"),
        (branches_on_tokens_at_the_end, "return"),
        (clips_tokens, "return"),
        (root_of_tokens, "return"),
        (counts_tokens, "for _ in"),
    ],
)
def test_branches_on_the_number_of_tokens(body, line):
    refused(body, "Python branches on the number of tokens", "config field", line)


ONE_TOKEN = {
    "is one": lambda x: x.shape[0] == 1,
    "is not one": lambda x: x.shape[0] != 1,
    "more than one": lambda x: x.shape[0] > 1,
    "fewer than two": lambda x: x.size(0) < 2,
    "length": lambda x: len(x) == 1,
    "elements": lambda x: x.numel() == 16,
    "truth": lambda x: x.shape[0] - 1,
    "shape": lambda x: x.shape == (1, 16),
    "other shape": lambda x: x.shape != (1, 16),
    "among": lambda x: x.shape[0] in (1, 2),
    "at least two": lambda x: max(x.shape[0], 2) == 2,
}


@pytest.mark.parametrize("ask", ONE_TOKEN)
@pytest.mark.parametrize("batched", [False, True])
def test_branches_on_one_token(ask, batched):
    """Also after operations that have asked the same on their own."""

    def asks(p, x, s):
        x = torch.softmax(F.linear(x, p["m"]) @ p["m"], -1)
        return x * p["w"] if ONE_TOKEN[ask](x.flatten(0, -2)) else x

    with pytest.raises(TraceError, match="Python branches on the number of tokens") as error:
        trace(model_of(asks), batched=batched)
    assert "test_refuse.py" in str(error.value.lines["from"])


def test_an_operation_that_asks_first_hides_no_branch():
    """A view of tokens in any layout asks torch whether there is one."""

    def asks(p, x, s):
        x = x.T.reshape(16, -1).T.contiguous()
        return x * p["w"] if x.shape[0] == 1 else x

    refused(asks, "Python branches on the number of tokens", "config field", "if x.shape")


def test_what_holds_for_any_number_of_tokens_is_no_branch():
    def asks(p, x, s):
        assert x.shape[0] == s.shape[0]
        assert x.shape[0]
        assert x.shape[0] > 0
        return x * p["w"]

    trace(model_of(asks))


def test_iterating_over_tokens():
    refused(
        lambda p, x, s: torch.stack([row for row in x]),
        "unbind is only recorded for one number of tokens",
        "index with",
    )


def test_a_power_of_the_number_of_tokens():
    refused(lambda p, x, s: x * x.shape[0] ** -0.5, "computed from the number of tokens", "config")


@fm.block
def takes_count(p, x, n):
    return x.reshape(n, 16) * p["w"]


def test_the_number_of_tokens_as_an_argument():
    refused(
        lambda p, x, s: takes_count(p["layers"][0], x, x.shape[0]),
        "the block takes_count is given the number of tokens",
        r"x\.shape\[0\]",
    )


def branches_on_dtype(p, x, s):
    return x.float().to(x.dtype) if x.dtype == torch.float16 else x * 2


def branches_on_another_dtype(p, x, s):
    return x if x.dtype != torch.bfloat16 else x * 2


def branches_on_half_dtypes(p, x, s):
    return x if x.dtype in (torch.float16, torch.bfloat16) else x * 2


def smallest_of_dtype(p, x, s):
    return x.clamp(min=torch.finfo(x.dtype).min / 2)


@pytest.mark.parametrize(
    "body",
    [branches_on_dtype, branches_on_another_dtype, branches_on_half_dtypes, smallest_of_dtype],
)
def test_branches_on_dtype(body):
    refused(body, "depends on the model's dtype", r"x\.float\(\)", "x.dtype")


def transformed(p, x, s):
    return x + torch.fft.rfft(x, dim=-1).real[..., :1]


def middle(p, x, s):
    return x - torch.quantile(x, 0.5, dim=-1, keepdim=True)


@pytest.mark.parametrize("body", [transformed, middle])
def test_operations_that_are_not_for_halves(body):
    refused(body, "is not for half precision", r"x\.float\(\) before it", "return")


def half_pairs(p, x, s):
    return torch.view_as_complex(x.unflatten(-1, (8, 2))).abs().sum(-1, True) * x


def half_polar(p, x, s):
    return x * torch.polar(x, x).real


@pytest.mark.parametrize("body", [half_pairs, half_polar])
def test_complex_numbers_of_the_models_dtype(body):
    refused(body, "bfloat16 has none", r"x\.float\(\) before it", "return")


def bits(p, x, s):
    return x * (x.view(torch.int16) > 3)


def from_bits(p, x, s):
    return x + (s[:, None].expand(x.shape) * 2).to(torch.int16).view(x.dtype)


@pytest.mark.parametrize("body", [bits, from_bits])
def test_bits_of_the_models_dtype(body):
    refused(body, "there may be 16 or 32", r"x\.float\(\)\.view", "return")


def test_an_operation_without_shapes():
    def quantised(p, x, s):
        return torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).to(x.dtype)

    refused(quantised, "torch does not say what shape it gives", "other operations", "return")


def branches_on_cuda(p, x, s):
    return x * 2 if x.is_cuda else x


def branches_on_device(p, x, s):
    where = x.device
    return x * 2 if where.type == "cuda" else x


def branches_on_parameters_device(p, x, s):
    return x * 2 if p["w"].get_device() >= 0 else x


@pytest.mark.parametrize(
    "body", [branches_on_cuda, branches_on_device, branches_on_parameters_device]
)
def test_branches_on_the_device(body):
    words = {"branches_on_cuda": "is_cuda", "branches_on_device": "x.device"}
    line = words.get(body.__name__, "get_device")
    refused(body, "depends on the device", "the same operations everywhere", line)


def without_gradients(p, x, s):
    with torch.no_grad():
        y = x * p["w"]
    return y


def with_autocast(p, x, s):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x * p["w"]
    return y


@pytest.mark.parametrize(
    ("body", "match", "fix"),
    [
        (without_gradients, "torch.no_grad or torch.inference_mode is active", r"x\.detach\(\)"),
        (with_autocast, "torch.autocast is active", "cast"),
    ],
)
def test_contexts_are_not_recorded(body, match, fix):
    refused(body, match, fix)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_tracing_without_gradients_is_fine():
    with torch.no_grad():
        trace(model_of(lambda p, x, s: x * p["w"]))


# Tensors from elsewhere


def reads_global(p, x, s):
    return x * A_TENSOR


def test_global_tensor():
    refused(reads_global, "a tensor from outside the function is read", r"P\(\.\.\.\)", "A_TENSOR")


def test_global_tensor_in_a_block():
    @fm.block
    def block(p, x):
        return x * p["w"] * A_TENSOR

    refused(lambda p, x, s: block(p, x), "a tensor from outside", r"P\(\.\.\.\)")


def test_block_closes_over_a_value():
    def body(p, x, s):
        y = x * 2

        @fm.block
        def block(q, x):
            return x * q["w"] * y

        return block(p["layers"][0], x)

    refused(body, "a block uses a value of the calling function", "as an argument", "* y")


def test_block_closes_over_a_parameter():
    def body(p, x, s):
        @fm.block
        def block(q, x):
            return x * q["w"] * p["w"]

        return block(p["layers"][0], x)

    refused(body, "a block uses the parameter w without being given it", "argument", '* p["w"]')


def test_block_calls_a_block_with_a_parameter_it_was_not_given():
    @fm.block
    def inner(q, x):
        return x * q["w"]

    def body(p, x, s):
        @fm.block
        def block(q, x):
            return inner(p["layers"][1], x)

        return block(p["layers"][0], x)

    refused(body, r"a block uses the parameter layers\.1\.w", "argument", "inner(p[")


@fm.block
def scaled(p, x, scale):
    return x * p["w"] * sum(scale)


def test_unhashable_static_argument():
    refused(
        lambda p, x, s: scaled(p["layers"][0], x, {1, 2}),
        "an argument of the block scaled cannot be compared",
        "frozen dataclass",
    )


# What only serving refuses: tokens of many requests lie in one batch


def attends(p, x, s):
    h = x.reshape(-1, 4, 4).transpose(0, 1)
    return F.scaled_dot_product_attention(h, h, h, is_causal=True).transpose(0, 1).reshape(-1, 16)


def conv_over_time(p, x, s):
    return F.conv1d(x.T[None], p["w"][:, None, None].expand(16, 1, 3), padding=1, groups=16)[0].T


def attends_by_hand(p, x, s):
    return (x @ x.T).softmax(-1) @ x


def index_of_tokens(p, x, s):
    return x + torch.arange(x.shape[0])[:, None]


MIXES = {
    "cumsum": (lambda p, x, s: x.cumsum(0), "torch.cumsum makes tokens"),
    "mean": (lambda p, x, s: x - x.mean(0), "torch.mean makes tokens"),
    "mean of all": (lambda p, x, s: x - x.mean(), "torch.mean makes tokens"),
    "sum": (lambda p, x, s: x - x.sum(dim=0), "torch.sum makes tokens"),
    "max": (lambda p, x, s: x / x.abs().max(), "torch.max makes tokens"),
    "softmax": (lambda p, x, s: x.softmax(0), "torch.softmax makes tokens"),
    "last": (lambda p, x, s: x * x[-1], "getitem makes tokens"),
    "last as a slice": (lambda p, x, s: x * x[-1:], "getitem makes tokens"),
    "all but one": (lambda p, x, s: torch.cat((x[1:], x[:1])), "getitem makes tokens"),
    "flip": (lambda p, x, s: x.flip(0), "torch.flip makes tokens"),
    "roll": (lambda p, x, s: x.roll(1, 0), "torch.roll makes tokens"),
    "sort": (lambda p, x, s: x.sort(0).values, "torch.sort makes tokens"),
    "chunk": (lambda p, x, s: torch.cat(x.chunk(2, 0)[::-1]), "torch.chunk makes tokens"),
    "longest position": (lambda p, x, s: x * s.max(), "torch.max makes tokens"),
    "rows": (lambda p, x, s: x[s], "ops.embed makes tokens"),
    "matmul": (attends_by_hand, "torch.matmul makes tokens"),
    "conv": (conv_over_time, "torch.conv1d makes tokens depend on each other"),
    "sdpa": (attends, "scaled_dot_product_attention is not known to leave tokens apart"),
    "number of tokens": (lambda p, x, s: x * x.shape[0], "computes with the number of tokens"),
    "index in the batch": (index_of_tokens, "torch.arange computes with the number of tokens"),
    "groups": (lambda p, x, s: F.group_norm(x[None], 1)[0], "F.group_norm makes tokens"),
    "pool": (lambda p, x, s: F.avg_pool1d(x.T, 3, 1, 1).T, "torch.avg_pool1d makes tokens"),
    "distances": (lambda p, x, s: x * torch.cdist(x, x).sum(-1, True), "torch.cdist makes tokens"),
    "place": (lambda p, x, s: x * torch.searchsorted(s, s)[:, None], "torch.searchsorted makes"),
    "set": (lambda p, x, s: x * torch.isin(s, s + 1)[:, None], "torch.isin makes tokens"),
    "first": (lambda p, x, s: x.select_scatter(p["w"], 0, 0), "torch.select_scatter makes"),
    "added": (lambda p, x, s: x.index_add(0, s, x), "torch.index_add makes tokens"),
    "halves": (lambda p, x, s: torch.cat(x.vsplit([2])[::-1]), "torch.tensor_split makes tokens"),
    "scrambled": (lambda p, x, s: x.T.reshape(-1, 16), "torch.reshape makes tokens"),
}


@pytest.mark.parametrize("name", MIXES)
def test_tokens_are_kept_apart(name):
    body, match = MIXES[name]
    program = trace(model_of(body))
    with pytest.raises(LoweringError, match=match) as error:
        check_tokens_apart(program)
    assert "ops.attention" in error.value.lines["fix"] or "positions" in error.value.lines["fix"]
    assert "test_refuse.py" in str(error.value.lines["from"])


def test_what_has_no_rule_gathers_in_training_and_is_refused_served():
    """Over a cut dim with a rule that cannot keep it cut, a model is gathered and served."""

    def with_rule(p, x, s):
        return torch.flip(x @ p["m"].T, (-1,)) @ p["m"]

    def without_rule(p, x, s):
        h = x @ p["m"].T
        return h.masked_scatter(h > 0, 2 * h) @ p["m"]

    for body, name in ((with_rule, "torch.flip"), (without_rule, "torch.masked_scatter")):
        model = model_of(body)
        model = fm.Model(model.name, None, model.params, model.forward, sharding={"mlp": "tp"})
        program = trace(model)
        assert [g.operation for g in partition(program).gathered] == [name]
        check_on_ranks(program, partition(program), 2, weights_of(model), *inputs_of(5))
        if body is with_rule:
            assert "torch.flip(all_gather" in source_for_vllm(model)
        else:
            with pytest.raises(LoweringError, match="masked_scatter is not known to leave tokens"):
                source_for_vllm(model)


# What is allowed, and gives the function's own values


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
    "no dropout": lambda p, x, s: F.dropout(F.dropout(x, 0.1, training=False), p=0.0),
    "assert on sizes": lambda p, x, s: x if x.shape[0] == s.shape[0] else None,
    "flip features": lambda p, x, s: x.flip(-1) + x.roll(1, -1),
    "numbers": lambda p, x, s: 1 - x + 2 / (x * x + 1) + 2**x + torch.rsub(x, 1.0, alpha=2),
    "integers": lambda p, x, s: x * ((~s & 3) | (s ^ 1) | (7 % (s + 1)) | (s >> 1))[..., None],
    "in blocks of heads": lambda p, x, s: x.view(x.shape[0], 4, 4).mT.flatten(-2),
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
    weights = weights_of(model)
    for count in (5, 9):
        tokens, positions = inputs_of(count)
        want = model.forward(weights, tokens, positions)
        got = evaluated(program, weights, tokens, positions)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)
    check_tokens_apart(program)
