"""One row a sharding rule: the partitioned operation, on ranks, equals the whole one.

A row is a small function of named tensors. `x="a/tp b"` is a tensor of axes a and b, whose dim a is
cut over the ranks. Values and gradients are checked on 1, 2, 3 and 4 ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcmodels as fm
from compiler import evaluate
from compiler.comm import Simulated
from compiler.ir import Program
from compiler.partition import partition
from compiler.rules import RULES
from compiler.trace import trace
from compiler.views import may_share_memory
from funcmodels import ops
from tests.compiler.programs import allowed, check_on_ranks, inputs_of, small, weights_of

SIZES = {
    "a": 12,
    "b": 4,
    "c": 6,
    "d": 2,
    "e": 24,
    "one": 1,
    "heads": 12,
    "kv": 3,
    "hd": 4,
    "cols": 48,
}
P = fm.axes(**SIZES)


@dataclass(frozen=True)
class Row:
    """A function of tensors, and how these lie.

    Args:
        name: of the test.
        fn: of the tensors, in order, after tokens where `tokens` is set; a tensor or several.
        tensors: axes of each, with /tp after the cut one.
        gathers: whether operands must be gathered, for want of a rule.
        tokens: whether fn takes (tokens, positions) first.
        parts: numbers of ranks that it must allow.
    """

    name: str
    fn: Callable[..., Any]
    tensors: tuple[str, ...]
    gathers: bool = False
    tokens: bool = False
    parts: tuple[int, ...] = (1, 2, 3, 4)

    @property
    def model(self) -> fm.Model:
        """logits = embed(tokens) + what fn gives, weighted so that no two elements are alike."""
        params = {f"t{i}": param(text) for i, text in enumerate(self.tensors)}

        def forward(params, tokens, positions, segment_ids=None):
            given = [params[name] for name in sorted(params) if name.startswith("t")]
            found = self.fn(*((tokens, positions) if self.tokens else ()), *given)
            logits = ops.unembed(ops.embed(tokens, params["embed"]), params["head"])
            for value in found if isinstance(found, (tuple, list)) else (found,):
                logits = logits + weighted(value, len(tokens.shape) if self.tokens else 0)
            return logits

        return small(forward, params)


def param(text: str) -> fm.Param:
    dims = [dim.partition("/") for dim in text.split()]
    spec = fm.PartitionSpec(*(mesh or None for _, _, mesh in dims))
    return P(" ".join(axis for axis, _, _ in dims), sharding=spec)


def weighted(value: Tensor, leading: int) -> Tensor:
    """The sum of a value's elements, each times another number."""
    sizes = value.shape[leading:]
    count = 1
    for n in sizes:
        count *= n
    numbers = torch.sin(torch.arange(1.0, count + 1, dtype=torch.float64)).reshape(sizes)
    total = value.to(torch.float64) * numbers
    dims = tuple(range(leading, len(value.shape)))
    return total.sum(dims).unsqueeze(-1) if leading else total.sum()


def system(x: Tensor) -> Tensor:
    """Square matrices that can be inverted, (..., n, n) of (..., n, m)."""
    n = x.shape[-2]
    return (x @ x.transpose(-1, -2)).tril(-1) + torch.eye(n)


def row(name: str, fn: Callable[..., Any], *tensors: str, **settings: Any) -> Row:
    return Row(name, fn, tensors, **settings)


def all_of(functions: Iterable[Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """What several functions give, each called by `fn`."""
    return lambda *tensors: [fn(f, *tensors) for f in functions]


def turned(x, y):
    """What of complex numbers is elementwise."""
    x, y = x.double(), y.double()
    z = torch.complex(x, y) * torch.polar(x.abs(), y)
    return torch.real(z) - z.imag


UNARY = (
    F.silu, F.gelu, F.softplus, F.leaky_relu, F.elu, F.mish, F.logsigmoid, F.hardtanh, F.relu6,
    F.hardswish, F.hardsigmoid, F.selu, F.celu, F.softsign, torch.abs, torch.exp, torch.expm1,
    torch.sigmoid, torch.tanh, torch.relu, torch.sin, torch.cos, torch.tan, torch.atan, torch.sinh,
    torch.cosh, torch.square, torch.erf, torch.erfc, torch.exp2, torch.neg, torch.nan_to_num,
    torch.reciprocal, torch.sign, torch.floor, torch.ceil, torch.round, torch.trunc, torch.detach,
    torch.zeros_like, torch.ones_like, torch.isnan, torch.isinf, torch.isfinite, F.hardshrink,
    F.softshrink, F.tanhshrink, torch.asinh, torch.frac, torch.positive, torch.signbit, torch.sinc,
    torch.sgn, torch.deg2rad, torch.rad2deg, torch.i0, torch.special.i0e,
    torch.special.i1, torch.special.i1e, torch.special.ndtr, torch.special.log_ndtr,
    torch.special.erfcx,
)  # fmt: skip
POSITIVE = (
    torch.lgamma,
    torch.digamma,
    torch.special.entr,
    torch.log,
    torch.log1p,
    torch.log2,
    torch.log10,
    torch.sqrt,
    torch.rsqrt,
)
BELOW_ONE = (torch.asin, torch.acos, torch.atanh, torch.erfinv)
BINARY = (
    torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum, torch.eq, torch.ne,
    torch.lt, torch.le, torch.gt, torch.ge, torch.atan2, torch.rsub, torch.fmod, torch.remainder,
    ops.swiglu, torch.logaddexp, torch.logaddexp2, torch.hypot, torch.copysign, torch.fmax,
    torch.fmin, torch.isclose, lambda x, y: torch.special.xlog1py(x, y.abs()),
    lambda x, y: torch.nextafter(x.detach(), y.detach()),
)  # fmt: skip
DIFFERENTIATED = (
    F.elu, F.celu, F.relu, torch.tanh, torch.sigmoid, F.softplus, F.leaky_relu, F.hardtanh,
    F.hardswish, torch.ops.aten.gelu,
)  # fmt: skip
LOGICAL = (torch.logical_and, torch.logical_or, torch.logical_xor)
BITWISE = (torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor, torch.gcd, torch.lcm)


def integer(x: Tensor) -> Tensor:
    return (x * 4).to(torch.int64) % 7


def square(x: Tensor) -> Tensor:
    """Positive definite matrices, (..., n, n) of (..., n, m)."""
    x = x.double()
    return x @ x.transpose(-1, -2) + 3 * torch.eye(x.shape[-2], dtype=x.dtype)


def paired(x: Tensor) -> Tensor:
    """Pairs of the last dim as complex numbers."""
    return torch.view_as_complex(x.double())


def mixed(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, **settings: Any) -> Tensor:
    """Experts, two of 0, 3, 6 and 9 for each token."""
    weights, ids = torch.topk(torch.sin(x), 2, dim=-1)
    return ops.experts(x, weights, 3 * ids, gate, up, down, **{"activation": "silu", **settings})


def latent(t: Tensor, s: Tensor, q: Tensor, r: Tensor, up: Tensor, z: Tensor, k: Tensor) -> Tensor:
    """Queries, a latent and a rope key that differ from token to token."""
    a, b = (f(n + 1.0)[:, None, None].to(q.dtype) for f, n in ((torch.sin, t), (torch.cos, s)))
    return ops.latent_attention(a * q, b * r, (a * z).squeeze(-2), (a + b) * k, up)


OAI = {"activation": "swigluoai", "alpha": 1.7, "limit": 0.5}

ROWS = [
    row("unary", all_of(UNARY, lambda f, x: f(x)), "a/tp b"),
    row("complex", turned, "a/tp b", "a/tp b"),
    row("unary of positives", all_of(POSITIVE, lambda f, x: f(x.abs() + 0.5)), "a/tp b"),
    row("polygamma", lambda x: (x.abs() + 1).polygamma(1) + torch.special.ndtri(x.sigmoid()), "a/tp b"),
    row("unary of small ones", all_of(BELOW_ONE, lambda f, x: f(x.tanh() / 2)), "a/tp b"),
    row("threshold", lambda x: F.threshold(x, 0.1, 2.0) + torch.logit(x.sigmoid()) + torch.acosh(x.abs() + 2), "a/tp b"),
    row("powers", lambda x, y: torch.float_power(x.abs() + 1, y) + torch.xlogy(x, y.abs() + 1)
        + torch.heaviside(x.detach(), y.detach()), "a/tp b", "a b"),
    row("binary", all_of(BINARY, lambda f, x, y: f(x, y)), "a/tp b", "a b"),
    row("floor_divide", lambda x, y: torch.floor_divide(x.detach(), y.detach()), "a/tp b", "a b"),
    row("logical", all_of(LOGICAL, lambda f, x, y: f(x > 0, y > 0)), "a/tp b", "a b"),
    row("bitwise", all_of(BITWISE, lambda f, x, y: f(integer(x), integer(y))), "a/tp b", "a b"),
    row("ldexp", lambda x, y: torch.ldexp(x, integer(y)), "a/tp b", "a b"),
    row("geglu", lambda x, y: ops.geglu(x, y, approximate="tanh"), "a/tp b", "a b"),
    row("bitwise_not", lambda x: ~integer(x), "a/tp b"),
    row("shifts", lambda x: (integer(x) << 2) + (integer(x) >> 1), "a/tp b"),
    row("logical_not", lambda x: torch.logical_not(x > 0), "a/tp b"),
    row("clamp", lambda x: x.clamp(-0.5, 0.5) + x.clamp_min(0.1) + x.clamp_max(0.2), "a/tp b"),
    row("pow", lambda x, y: torch.pow(x.abs() + 0.5, y), "a/tp b", "b"),
    row("full_like", lambda x: torch.full_like(x, 3.0) * x, "a/tp b"),
    row("to", lambda x: x.to(torch.float32).to(torch.float64), "a/tp b"),
    row("where", lambda x, y: torch.where(x > 0, x, y), "a/tp b", "b"),
    row("where number", lambda x: torch.where(x > 0, x, 0.0), "a/tp b"),
    row("lerp", lambda x, y: torch.lerp(x, y, 0.3), "a/tp b", "a b"),
    row("masked_fill", lambda x, y: x.masked_fill(y > 0, 2.0), "a/tp b", "b"),
    row("addcmul", lambda x, y: torch.addcmul(x, x, y, value=2.0), "a/tp b", "a b"),
    row("addcdiv", lambda x, y: torch.addcdiv(x, x, y.exp()), "a/tp b", "a b"),
    # Operands that lie differently, or are broadcast
    row("whole beside cut", lambda x, y: x * y, "a b", "a/tp b"),
    row("vector beside cut", lambda x, y: x * y, "a/tp b", "b"),
    row("cut vector", lambda x, y: x * y, "b a", "a/tp"),
    row("scalar", lambda x, y: x * y + 1, "a/tp b", ""),
    row("two dims cut", lambda x, y: x * y, "a/tp e", "a e/tp"),
    row("one beside many", lambda x, y: x * y, "one/tp b", "a/tp b"),
    row("many beside one", lambda x, y: x * y, "a/tp b", "one/tp b"),
    row("blocks of two sizes", lambda x, y: x.reshape(6, 8) * y[:, :8], "a/tp b", "c/tp e", parts=(1, 2, 3)),
    row("same twice", lambda x: x * x, "a/tp b"),
    # Pending sums
    row("neg of partial", lambda x: -x.sum(0), "a/tp b"),
    row("add of partials", lambda x, y: x.sum(0) + y.sum(0), "a/tp b", "a/tp b"),
    row("add to partial", lambda x, y: x.sum(0) + y, "a/tp b", "b"),
    row("mul of partial", lambda x, y: x.sum(0) * y, "a/tp b", "b"),
    row("shapes of partial", lambda x: x.sum(0).reshape(2, 2).T.unsqueeze(0).squeeze(0), "a/tp b"),
    row("silu of partial", lambda x: F.silu(x.sum(0)), "a/tp b"),
    row("softmax of partial", lambda x: x.sum(0).softmax(-1), "a/tp b"),
    row("getitem of partial", lambda x: x.sum(0)[1:3], "a/tp b"),
    row("expand of partial", lambda x: x.sum(0).expand(3, 4), "a/tp b"),
    # Products
    row("einsum rows", lambda x, w: torch.einsum("ab,eb->ae", x, w), "a b", "e/tp b"),
    row("einsum columns", lambda x, w: torch.einsum("ba,ea->be", x, w), "b a/tp", "e a/tp"),
    row("einsum batch", lambda x, w: torch.einsum("ab,abd->ad", x, w), "a/tp b", "a/tp b d"),
    row("einsum ellipsis", lambda x, w: torch.einsum("...b,eb->...e", x, w), "d c b", "e/tp b"),
    row("einsum three", lambda x, y, z: torch.einsum("ab,bc,cd->ad", x, y, z), "a/tp b", "b c", "c d"),
    row("einsum one", lambda x: torch.einsum("ab->ba", x), "a/tp b"),
    row("einsum sum", lambda x: torch.einsum("ab->b", x), "a/tp b"),
    row("einsum two cut", lambda x, w: torch.einsum("ab,eb->ae", x, w), "a/tp b", "e/tp b"),
    row("einsum diagonal", lambda x: torch.einsum("aab->ab", x.expand(12, 12, 4)), "a/tp b", gathers=True),
    # One value given twice: cut in one place, whole in the other.
    row("twice rows", lambda x: torch.einsum("ab,eb->ae", x, x), "a/tp b"),
    row("twice columns", lambda x: torch.einsum("ab,ac->bc", x, x), "b a/tp"),
    row("twice, summed", lambda x: torch.einsum("ab,ac->abc", x, x).sum(1), "b a/tp"),
    row("twice linear", lambda x: F.linear(x, x), "a/tp b"),
    row("twice matmul", lambda x: torch.matmul(x.expand(12, 12), x.expand(12, 12)), "one a/tp"),
    row("twice tensordot", lambda x: torch.tensordot(x, x, ([0], [0])), "b a/tp"),
    row("twice outer", lambda x: [torch.outer(x[0], x[0]), torch.outer(x[0], x[0]).sum(0)], "b a/tp"),
    row("twice distances", lambda x: [torch.cdist(x, x), torch.cdist(x, x).sum(0)], "a/tp b"),
    row("twice sorted", lambda x: torch.searchsorted(x, x), "b a/tp"),
    row("twice a set", lambda x: torch.isin(x[0], x[0]), "b a/tp"),
    row("einsum one beside many", lambda x, y: torch.einsum("...b,...b->...", x, y), "a/tp b", "one b"),
    row("einsum one beside many cut", lambda x, w: torch.einsum("bd,eb->ed", w, x), "e/tp one", "b d",
        parts=(1, 2, 3, 4)),
    row("matmul rows", lambda x, w: x @ w, "a/tp b", "b e"),
    row("matmul columns", lambda x, w: x @ w, "a b", "b e/tp"),
    row("matmul inner", lambda x, w: x @ w, "b a/tp", "a/tp e"),
    row("matmul batch", lambda x, w: x @ w, "a/tp b d", "a/tp d c"),
    row("matmul broadcast", lambda x, w: x @ w, "a/tp b d", "one d c"),
    row("matmul of ranks", lambda x, w: x @ w, "a/tp b d", "d c"),
    row("matmul vector", lambda x, w: x @ w, "a/tp b", "b"),
    row("matmul of vector", lambda x, w: x @ w, "a/tp", "a/tp b"),
    row("matmul dot", lambda x, w: x @ w, "a/tp", "a/tp"),
    row("linear rows", lambda x, w: F.linear(x, w), "b a", "e/tp a"),
    row("linear columns", lambda x, w: F.linear(x, w), "b a/tp", "e a/tp"),
    row("linear bias", lambda x, w, b: F.linear(x, w, b), "b a", "e/tp a", "e/tp"),
    row("linear whole bias", lambda x, w, b: F.linear(x, w, b), "b a", "e/tp a", "e"),
    row("linear partial bias", lambda x, w, b: F.linear(x, w, b), "b a/tp", "e a/tp", "e"),
    row("linear partial, cut bias", lambda x, w, b: F.linear(x, w, bias=b), "b a/tp", "e a/tp", "e/tp"),
    row("linear of a vector", lambda x, w: F.linear(x, w), "b a/tp", "a"),
    row("linear of a cut vector", lambda x, w: F.linear(x, w), "b a", "a/tp"),
    row("linear of a vector, rows", lambda x, w: F.linear(x, w), "a/tp b", "b"),
    row("addmm", lambda x, w, b: torch.addmm(b, x, w.T) + torch.addmm(b, x, mat2=w.T, beta=2, alpha=0.5)
        + torch.addmm(b.detach() / 0, x, w.T, beta=0), "b a/tp", "e a/tp", "e"),
    row("baddbmm", lambda x, w, b: torch.baddbmm(b, x, w), "d b a/tp", "d a/tp c", "c"),
    row("tensordot", lambda x, w: torch.tensordot(x, w, ([-1, 0], [1, 0])) + torch.tensordot(  # type: ignore[arg-type]
        x, w.transpose(0, 1), dims=1).sum(1)[1], "d a/tp", "d a/tp b"),
    row("outer", lambda x, y, w: x.outer(y) + torch.inner(x @ w, y) + w.mv(y).dot(x), "a/tp", "b", "a b"),
    row("unembed", lambda x, w: ops.unembed(x, w), "b a", "e/tp a"),
    # Shapes
    row("reshape merge", lambda x: x.reshape(48), "a/tp b"),
    row("reshape split", lambda x: x.reshape(12, 2, 2), "a/tp b"),
    row("reshape split cut", lambda x: x.reshape(6, 2, 4), "a/tp b", parts=(1, 2, 3)),
    row("reshape not leading", lambda x: x.reshape(48), "b a/tp", gathers=True),
    row("reshape keeps", lambda x: x.reshape(2, 2, 12), "b a/tp"),
    row("reshape with -1", lambda x: x.reshape(-1, 2, 2), "a/tp b"),
    row("flatten", lambda x: x.flatten(1), "d a/tp b"),
    row("unflatten", lambda x: x.unflatten(0, (3, 4)), "a/tp b", parts=(1, 3)),
    row("transpose", lambda x: x.transpose(0, 1), "a/tp b"),
    row("T", lambda x: x.T, "a/tp b"),
    row("permute", lambda x: x.permute(2, 0, 1), "d a/tp b"),
    row("movedim", lambda x: x.movedim(1, -1), "d a/tp b"),
    row("movedim several", lambda x: x.movedim((0, 1), (1, 2)), "d a/tp b"),
    row("unsqueeze", lambda x: x.unsqueeze(1) + x.unsqueeze(-1).sum(-1, keepdim=True).transpose(1, 2), "a/tp b"),
    row("squeeze", lambda x: x.unsqueeze(1).squeeze(1), "a/tp b"),
    row("squeeze last", lambda x: x.unsqueeze(-1).squeeze(-1), "b a/tp"),
    row("squeeze several", lambda x: x[None, :, None].squeeze((0, 2)), "a/tp b"),
    row("squeeze one of several", lambda x: x[None, :, None].squeeze((-2,)), "a/tp b"),
    row("expand", lambda x: x[:, None].expand(12, 3, 4), "a/tp b"),
    row("expand adds a dim", lambda x: x.expand(2, 12, 4), "a/tp b"),
    row("expand the one block", lambda x, y: x.expand(12, 4) * y, "one/tp b", "a b"),
    row("repeat", lambda x: x.repeat(1, 2), "a/tp b"),
    row("repeat cut", lambda x: x.repeat(2, 1), "a/tp b", gathers=True),
    row("repeat_interleave", lambda x: x.repeat_interleave(4, dim=0), "a/tp b"),
    row("repeat kv heads", lambda k, q: k.repeat_interleave(4, dim=0) * q, "kv/tp hd", "heads hd", parts=(1, 3)),
    row("repeat to a size", lambda x: torch.repeat_interleave(x, 2, dim=0, output_size=24), "a/tp b"),
    row("tril", lambda x: x.tril() + x.triu(1), "a/tp b c"),
    row("solve_triangular", lambda A, B: torch.linalg.solve_triangular(system(A), B, upper=False), "a/tp b c", "a/tp b d"),
    row("tril of the cut", lambda x: x.tril(), "a/tp b", gathers=True),
    row("pad", lambda x: F.pad(x, (1, 2)), "a/tp b"),
    row("pad the cut", lambda x: F.pad(x, (0, 0, 1, 0)), "a/tp b", gathers=True),
    # Taking apart, putting together
    row("getitem", lambda x: x[:, 1:3] + x[..., 0, None], "a/tp b"),
    row("getitem int", lambda x: x[1], "b a/tp"),
    row("getitem none", lambda x: x[None, :, None], "a/tp b"),
    row("getitem all", lambda x: x[:, :2] + x[:, 2:], "a/tp b"),
    row("getitem of the cut", lambda x: x[1:], "a/tp b", gathers=True),
    row("getitem list", lambda x: x[:, [0, 2]] + x[..., [1, 3]], "a/tp b"),
    row("getitem list of the cut", lambda x: x[[0, 2]], "a/tp b", gathers=True),
    row("getitem numbers", lambda x: x[:, :, integer(x.sum(1)[0]) % 4], "d a/tp b"),
    row("getitem table of numbers", lambda x, y: x[:, integer(y) % 4], "a/tp b", "d c"),
    row("getitem numbers first", lambda x, y: x[integer(y) % 2], "d a/tp b", "c e"),
    row("getitem by cut numbers", lambda x, y: x[:, integer(y) % 4], "b c d", "a/tp b"),
    row("getitem by two", lambda x: x[:, [0, 1], [1, 0]], "a/tp b c", gathers=True),
    row("index_select", lambda x, y: x.index_select(-1, integer(y) % 4), "a/tp b", "c"),
    row("index_select by the cut", lambda x, y: x.index_select(1, integer(y) % 4), "d b", "a/tp"),
    row("index_select of the cut", lambda x, y: x.index_select(0, integer(y)), "a/tp b", "c", gathers=True),
    row("select", lambda x: torch.select(x, -1, 2) + x.select(1, 0), "a/tp b"),
    row("select before", lambda x: x.select(0, 1), "d a/tp b"),
    row("narrow", lambda x: x.narrow(-1, 1, 2), "a/tp b"),
    row("narrow the cut", lambda x: x.narrow(0, 1, 2), "a/tp b", gathers=True),
    row("windows", lambda x: x.unfold(-1, 2, 1), "a/tp b"),
    row("split", lambda x: x.split(2, -1), "a/tp b"),
    row("split sizes", lambda x: x.split([1, 3], dim=1), "a/tp b"),
    row("split the cut", lambda x: x.split(6, 0), "a/tp b", gathers=True),
    row("tensor_split", lambda x: x.tensor_split(3, -1), "a/tp b"),
    row("chunk", lambda x: x.chunk(2, -1), "a/tp b"),
    row("unbind", lambda x: x.unbind(0), "b a/tp"),
    row("unbind the cut", lambda x: x.unbind(0)[:2], "a/tp b", gathers=True),
    row("cat", lambda x, y: torch.cat((x, y), 1), "a/tp b", "a c"),
    row("cat of the cut", lambda x, y: torch.cat((x, y)), "a/tp b", "e/tp b", gathers=True),
    row("stack", lambda x, y: torch.stack((x, y), 0), "a/tp b", "a b"),
    row("stack last", lambda x, y: torch.stack((x, x, y), -1), "a/tp b", "a/tp b"),
    # Reductions, and what works along a dim
    row("sum", lambda x: x.sum(), "a/tp b"),
    row("sum of the cut", lambda x: x.sum(0, keepdim=True), "a/tp b"),
    row("sum of others", lambda x: x.sum(-1), "a/tp b"),
    row("sum of both", lambda x: x.sum((0, 1)), "a/tp b"),
    row("mean", lambda x: x.mean(-1, keepdim=True), "a/tp b"),
    row("mean of the cut", lambda x: x.mean(0) + x.mean(0, keepdim=True)[0] ** 2, "a/tp b"),
    row("mean of both", lambda x: x.mean((0, 1)), "a/tp b", gathers=True),
    row("amax", lambda x: x.amax(-1) + x.amin((1,)), "a/tp b"),
    row("logsumexp", lambda x: x.logsumexp(0), "b a/tp"),
    row("var", lambda x: x.var(-1, True) + torch.std(x, -1, correction=0), "a/tp b"),
    row("prod", lambda x: x.prod(-1), "a/tp b"),
    row("max", lambda x: x.max(-1).values + x.min(-1)[0], "a/tp b"),
    row("max of two", lambda x, y: torch.max(x, y) + torch.min(x, y), "a/tp b", "a b"),
    row("argmax", lambda x: x.argmax(-1, keepdim=True) + x.argmin(-1, keepdim=True), "a/tp b"),
    row("any", lambda x: (x > 0).any(-1).to(x.dtype) + (x > 0).all(-1).to(x.dtype), "a/tp b"),
    row("norm", lambda x: x / x.norm(dim=-1, keepdim=True), "a/tp b"),
    row("vector_norm", lambda x: torch.linalg.vector_norm(x, dim=-1), "a/tp b"),
    row("norm of all", lambda x: x / x.norm(), "a/tp b", gathers=True),
    row("softmax", lambda x: x.softmax(-1), "a/tp b"),
    row("softmax of the cut", lambda x: x.softmax(0) + F.softmax(x, 0, dtype=torch.float64), "a/tp b"),
    row("log_softmax", lambda x: x.log_softmax(-1) + F.log_softmax(x, dim=-1), "a/tp b"),
    row("log_softmax of the cut", lambda x: x.log_softmax(-1) + F.log_softmax(x, dim=-1), "b a/tp"),
    row("logsumexp of the cut", lambda x: x.logsumexp(0) + x.logsumexp(0, keepdim=True)[0], "a/tp b"),
    row("logsumexp of nothing", lambda x: torch.where(x > 9, x, -torch.inf).logsumexp(0).exp(), "a/tp b"),
    row("amax of the cut", lambda x: x.amax(0) * x.amin((0,)) + x.amax(0, True)[0], "a/tp b"),
    row("amax of many alike", lambda x: (x.relu() - x.sign()).amax(0), "a/tp b"),
    row("amax of blocks on several ranks", lambda x: x.amax(1), "b kv/tp d", parts=(1, 3)),
    row("amax of numbers", lambda x: integer(x).amax(0), "a/tp b"),
    row("argmax of the cut", lambda x: x.argmax(0) + 3 * x.argmin(0, keepdim=True), "a/tp b"),
    row("argmax of many alike", lambda x: integer(x).argmax(1) + x.sign().argmax(-1), "b a/tp"),
    row("any of the cut", lambda x: (x > 1).any(0).to(x.dtype) + 2 * (x > -1).all(0), "a/tp b"),
    row("var of the cut", lambda x: x.var(0) + torch.var(x, 0, correction=0, keepdim=True), "a/tp b"),
    row("std of the cut", lambda x: x.std(1, False) + torch.std(x, dim=-1), "b a/tp"),
    row("norm of the cut", lambda x: x.norm(dim=0) + torch.linalg.vector_norm(x, dim=0), "a/tp b"),
    row("norm of another order", lambda x: x.norm(3, dim=0), "a/tp b", gathers=True),
    row("cumsum", lambda x: x.cumsum(-1) + x.cumprod(-1), "a/tp b"),
    row("flip", lambda x: x.flip(-1) + x.roll(1, -1), "a/tp b"),
    row("flip of the cut", lambda x: x.flip(0), "a/tp b", gathers=True),
    row("cummax", lambda x: x.cummax(-1).values + torch.cummin(x, -1)[0] + x.logcumsumexp(-1), "a/tp b"),
    row("cumsum of the cut", lambda x: x.cumsum(0), "a/tp b", gathers=True),
    row("topk of the cut", lambda x: x.topk(2, 0).values, "a/tp b", gathers=True),
    row("sort of the cut", lambda x: x.sort(0).values, "a/tp b", gathers=True),
    row("median", lambda x: x.median(-1).values + x.nansum(-1) + x.nanmean(-1), "a/tp b"),
    row("aminmax", lambda x: torch.aminmax(x, dim=-1), "a/tp b"),
    row("count_nonzero", lambda x: torch.count_nonzero(x > 0, -1), "a/tp b"),
    row("var_mean", lambda x: (*torch.var_mean(x, -1), *torch.std_mean(x, -1)), "a/tp b"),
    row("kthvalue", lambda x: x.kthvalue(2, -1).values, "a/tp b"),
    row("kthvalue before", lambda x: x.kthvalue(2, 0).values, "c a/tp"),
    row("diff", lambda x: x.diff() + x.diff(dim=1), "a/tp b"),
    row("glu", lambda x: F.glu(x) + F.softmin(x, -1)[:, :2], "a/tp b"),
    row("normalize", lambda x: F.normalize(x) + F.normalize(x, dim=-1, p=1.0), "a/tp b"),
    row("normalize the cut", lambda x: F.normalize(x, dim=0), "a/tp b"),
    row("normalize the cut by another order", lambda x: F.normalize(x, 1.0, 0), "a/tp b", gathers=True),
    row("scatter", lambda x, y: x.scatter(1, integer(y) % 4, y) + torch.scatter_add(x, 1, integer(y) % 4, y),
        "a/tp b", "a b"),
    row("cosine_similarity", lambda x, y: F.cosine_similarity(x, y) + F.cosine_similarity(x, y, dim=-1), "a/tp b", "a b"),
    row("cosine_similarity over the cut", lambda x, y: F.cosine_similarity(x, y, dim=0), "a/tp b", "a b", gathers=True),
    # Convolution over time
    row("conv1d depthwise", lambda x, w, b: torch.conv1d(x, w, b, padding=2, groups=12),
        "a/tp e", "a/tp one b", "a/tp"),
    row("conv1d depthwise batch", lambda x, w: F.conv1d(x, w, None, 1, 3, 1, 12), "d a e", "a/tp one b"),
    row("conv1d of cut channels", lambda x, w: F.conv1d(x, w, groups=12), "a/tp e", "a one b"),
    row("conv1d rows", lambda x, w, b: F.conv1d(x, w, b), "b e", "a/tp b d", "a/tp"),
    row("conv1d columns", lambda x, w: F.conv1d(x, w), "a/tp e", "c a/tp b"),
    row("conv1d columns and bias", lambda x, w, b: F.conv1d(x, w, b), "a/tp e", "c a/tp b", "c"),
    row("conv1d grouped", lambda x, w: F.conv1d(x, w, groups=2), "c/tp e", "a kv d", gathers=True, parts=(1, 2, 3)),
    row("conv1d over cut time", lambda x, w: F.conv1d(x, w), "b e/tp", "a b d", gathers=True),
    row("sort", lambda x: x.sort(-1).values + x.argsort(-1), "a/tp b"),
    row("topk", lambda x: x.topk(2, -1).values, "a/tp b"),
    row("gather", lambda x: x.gather(-1, x.argsort(-1)), "a/tp b"),
    row("take_along_dim", lambda x: torch.take_along_dim(x, x.argsort(-1), -1), "a/tp b"),
    row("rms_norm", lambda x, w: ops.rms_norm(x, w, eps=1e-5), "a/tp b", "b"),
    row("rms_norm of the cut", lambda x, w: ops.rms_norm(x, w, eps=1e-5), "b a/tp", "a"),
    row("rms_norm of the cut, all", lambda x, w: ops.rms_norm(x, w, eps=1e-5, offset=1.0), "b a/tp", "a/tp"),
    row("rms_norm of the cut, once", lambda x, w: ops.rms_norm(x, w, eps=1e-5, rounds_once=True), "b a/tp", "a"),
    row("rms_norm of heads, columns of weight", lambda x, w: ops.rms_norm(x.reshape(2, 48), w, eps=1e-5),
        "d heads/tp hd", "cols/tp"),
    row("layer_norm of the cut", lambda x, w, b: ops.layer_norm(x, w, b, eps=1e-5), "b a/tp", "a", "a/tp"),
    row("F.layer_norm of the cut", lambda x, w: F.layer_norm(x, (12,), w, None, 1e-5) + F.layer_norm(x, (12,)), "b a/tp", "a"),
    row("rms_norm of blocks on several ranks", lambda x, w: ops.rms_norm(x.reshape(4, 6), w, eps=1e-5),
        "b kv/tp d", "c", parts=(1, 3)),
    row("rms_norm of one block", lambda x, w: ops.rms_norm(x.flatten(-2), w, eps=1e-5), "b one/tp c", "c"),
    row("rms_norm of a cut weight", lambda x, w: ops.rms_norm(x, w, eps=1e-5), "b a", "a/tp"),
    row("layer_norm", lambda x, w, b: ops.layer_norm(x, w, b, eps=1e-5), "a/tp b", "b", "b"),
    row("F.rms_norm of the cut", lambda x, w: F.rms_norm(x, (12,), w, 1e-5) + F.rms_norm(x, (12,), eps=0.1), "b a/tp", "a"),
    row("F.rms_norm of the cut, both", lambda x, w: F.rms_norm(x, (12,), w, 1e-5), "b a/tp", "a/tp"),
    row("F.rms_norm of the cut, no eps", lambda x, w: F.rms_norm(x, (12,), w), "b a/tp", "a"),
    row("F.rms_norm", lambda x, w: F.rms_norm(x, (4,), w, 1e-5), "a/tp b", "b"),
    row("F.layer_norm", lambda x, w: F.layer_norm(x, (4,), w, None, 1e-5), "a/tp b", "b"),
    row("gradients", all_of(DIFFERENTIATED, lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x)), "a/tp b"),
    row("gradients of softmax", lambda x: torch.func.grad(lambda y: y.softmax(-1).square().sum())(x)
        + torch.func.grad(lambda y: y.log_softmax(-1).square().sum())(x), "a/tp b"),
    row("gradient of softmax of the cut", lambda x: torch.func.grad(
        lambda y: y.softmax(0).square().sum())(x), "a/tp b", gathers=True),
    row("bucketize", lambda x, y: torch.bucketize(x.detach(), y.detach().sort(-1).values), "a/tp b", "c"),
    row("prelu", lambda x, w, v: F.prelu(x, w) + F.prelu(x, v), "a/tp b", "one", "b"),
    row("prelu of the cut", lambda x, w: F.prelu(x, w), "b a/tp", "a", gathers=True),
    row("tile", lambda x: x.tile(2) + torch.tile(x, (1, 2)) + torch.hstack((x, x)), "a/tp b"),
    # Groups, stretches and pairs
    row("group_norm", lambda x, w, b: F.group_norm(x, 6, w, b, 1e-5), "b a/tp", "a", "a", parts=(1, 2, 3)),
    row("group_norm of cut weights", lambda x, w: F.group_norm(x[None], 12, weight=w), "a/tp e", "a/tp"),
    row("group_norm of heads", lambda x, w: F.group_norm(x.flatten(1), 12, w), "d heads/tp hd", "cols"),
    row("group_norm of heads, columns of weight", lambda x, w: F.group_norm(x.flatten(1), 24, w, w),
        "d heads/tp hd", "cols/tp"),
    row("group_norm of cut batch", lambda x, w: F.group_norm(x, 2, w), "a/tp b", "b"),
    row("group_norm over the cut", lambda x: F.group_norm(x, 1), "b a/tp", gathers=True),
    row("group_norm over cut time", lambda x: F.group_norm(x[None], 2), "b a/tp", gathers=True),
    row("pools", lambda x: (F.avg_pool1d(x, 2) + F.max_pool1d(x, 2) + F.lp_pool1d(x.abs(), 2, 2),
        F.adaptive_avg_pool1d(x, 3) + F.adaptive_max_pool1d(x, 3),
        F.max_pool1d(x, 2, return_indices=True)[0] * F.adaptive_max_pool1d(x, 2, True)[0]), "a/tp b"),
    row("pools over the cut", lambda x: F.avg_pool1d(x, 2), "b a/tp", gathers=True),
    row("view_as_complex", lambda x, y: torch.view_as_real(paired(x) * paired(y).conj().resolve_conj()), "a/tp b d", "b d"),
    row("view_as_complex of a sum", lambda x: torch.view_as_real(paired(x).sum(0)) + paired(x).angle().sum(), "a/tp b d"),
    row("view_as_complex of the cut", lambda x: torch.view_as_real(paired(x)), "a b d/tp", gathers=True, parts=(1, 2, 4)),
    row("complex numbers gathered", lambda x: torch.view_as_real(paired(x).flip(0)), "a/tp b d", gathers=True),
    row("bits", lambda x: (x.float().view(torch.int32), x.float().view(torch.int16), x.float().view(torch.int64)), "a/tp b"),
    row("fewer bits of the cut", lambda x: x.double().view(torch.int32), "b a/tp"),
    row("more bits of the cut", lambda x: x.float().view(torch.int64), "b a/tp", gathers=True),
    row("select_scatter", lambda x, y: torch.select_scatter(x, y, 1, 2) + x.select_scatter(y, dim=-1, index=0), "a/tp b", "a"),
    row("select_scatter of a cut part", lambda x, y: x.select_scatter(y, 0, 1), "d a", "a/tp"),
    row("select_scatter into the cut", lambda x, y: x.select_scatter(y, 0, 2), "a/tp b", "b", gathers=True),
    row("slice_scatter", lambda x, y: torch.slice_scatter(x, y, 1, 1, 3) + x.slice_scatter(src=y, dim=1, step=2), "a/tp b", "a d"),
    row("slice_scatter into the cut", lambda x, y: x.slice_scatter(y, 0, 1, 3), "a/tp b", "d b", gathers=True),
    row("index_add", lambda x, y: x.index_add(1, torch.tensor([2, 0]), y) + x.index_copy(-1, torch.tensor([2, 0]), y)
        + x.index_reduce(1, torch.tensor([2, 0]), y, "amax") + x.index_fill(1, torch.tensor([2, 0]), 2.0), "a/tp b", "a d"),
    row("index_add of a cut part", lambda x, y: torch.index_add(x, 0, torch.tensor([2, 0]), source=y, alpha=2), "b a", "d a/tp"),
    row("index_add to the cut", lambda x, y: x.index_add(0, torch.tensor([2, 0]), y), "a/tp b", "d b", gathers=True),
    row("cdist", lambda x, y: torch.cdist(x, y), "a/tp b", "c b"),
    row("cdist to the cut", lambda x, y: torch.cdist(x, y, 1.0) + torch.cdist(x2=x, x1=y).T, "c b", "a/tp b"),
    row("cdist in batches", lambda x, y: torch.cdist(x, y), "a/tp b d", "a c d"),
    row("cdist over cut features", lambda x, y: torch.cdist(x, y), "b a/tp", "c a/tp", gathers=True),
    row("searchsorted", lambda x, y: torch.searchsorted(y.detach().sort(-1).values, x.detach(), right=True), "a/tp b", "c"),
    row("searchsorted in rows", lambda x, y: torch.searchsorted(y.detach().sort(-1).values, x.detach()), "a b", "a/tp c"),
    row("searchsorted in rows, cut values", lambda x, y: torch.searchsorted(y.detach().sort(-1).values, x.detach()), "b a/tp", "b c"),
    row("searchsorted in cut rows", lambda x, y: torch.searchsorted(y.detach().sort(-1).values, x.detach()), "b c", "b a/tp", gathers=True),
    row("isin", lambda x, y: torch.isin(integer(x), integer(y)) & torch.isin(integer(x), torch.tensor([2, 0])), "a/tp b", "d"),
    row("hsplit", lambda x: (*x.hsplit(2), *torch.vsplit(x.T, [1, 3]), *x[..., None].dsplit([1])), "a/tp b"),
    row("hsplit the cut", lambda x: x.hsplit(2), "b a/tp", gathers=True),
    row("vstack", lambda x, y: (torch.vstack((x.T, y.T)), torch.column_stack((x, y)),
        torch.dstack((x[..., None], y[..., None]))), "a/tp b", "a/tp b"),
    row("new_tensor", lambda x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0]), "a/tp b"),
    row("masked_scatter", lambda x, y: x.masked_scatter(x > 0, y), "a/tp b", "a b", gathers=True),
    row("one_hot", lambda x: F.one_hot(integer(x), 7), "a/tp b"),
    row("constants", lambda x: x + x.new_zeros(12, 4) + x.new_ones(4) + x.new_full((4,), 2.0)
        + torch.zeros(12, 4) + torch.ones(4) + torch.full((12, 4), 3.0), "a/tp b"),
    # Matrices, spectra, channels, and two along a dim
    row("diagonal", lambda x: torch.diagonal(x, 1, -1, 1) + x.diagonal(dim1=1, dim2=2)[:, :3], "a/tp b c"),
    row("diagonal before the cut", lambda x: torch.diagonal(x, 0, 2, 0), "b c a/tp", gathers=True),
    row("diagonal of others", lambda x: x.diagonal(), "b c a/tp"),
    row("diagonal of a sum", lambda x: x.sum(0).diagonal() + x.sum(0).diag_embed().sum((0, 1))[:4], "a/tp b c"),
    row("diagonal of the cut", lambda x: x.diagonal(), "a/tp b c", gathers=True),
    row("diag_embed", lambda x: torch.diag_embed(x, 1) + torch.diag_embed(x, offset=-1, dim1=-1, dim2=1), "a/tp b"),
    row("diag_embed before", lambda x: torch.diag_embed(x, 0, 0, 1), "a/tp b"),
    row("diag_embed of the cut", lambda x: torch.diag_embed(x), "b a/tp", gathers=True),
    row("rot90", lambda x: torch.rot90(x, 2, (1, 2)) + x.rot90(4, [-1, 1]), "a/tp b c"),
    row("rot90 of the cut", lambda x: x.rot90(), "a/tp b c", gathers=True),
    row("matrices", lambda x: (torch.linalg.inv(square(x)), torch.linalg.det(square(x)), torch.linalg.slogdet(square(x))[1],
        torch.linalg.pinv(square(x)), torch.linalg.cholesky(square(x)), torch.linalg.matrix_exp(square(x) / 9),
        torch.linalg.matrix_power(square(x), 2), torch.linalg.eigvalsh(square(x)), torch.linalg.eigh(square(x))[0],
        torch.linalg.svdvals(square(x)), torch.linalg.qr(square(x))[1].abs(), torch.linalg.matrix_norm(x.double())), "a/tp b c"),
    row("matrices of the cut", lambda x: torch.linalg.matrix_norm(x), "d b/tp c", gathers=True, parts=(1, 2, 4)),
    row("inverses of the cut", lambda x: torch.linalg.inv(x.mT @ x + torch.eye(6)), "d b c/tp", gathers=True, parts=(1, 2, 3)),
    row("matrix_norm of others", lambda x: torch.linalg.matrix_norm(x, dim=(0, 1)), "b/tp d c", gathers=True, parts=(1, 2, 4)),
    row("solve", lambda x, y: torch.linalg.solve(square(x), y.double()), "a/tp b c", "a b d"),
    row("solve by a cut matrix", lambda x, y: torch.linalg.solve(x.double().mT @ x.double(), y.double()), "d a b/tp", "d b c",
        gathers=True, parts=(1, 2, 4)),
    row("fft", lambda x: (torch.fft.rfft(x.double()).abs(), torch.fft.irfft(torch.fft.rfft(x.double(), dim=-1) * 2, n=4),
        torch.fft.ifft(torch.fft.fft(x.double(), 3, 1)).real, torch.fft.hfft(x.double()), torch.fft.ihfft(x.double()).imag,
        torch.fft.fftshift(x, dim=1) + torch.fft.ifftshift(x, -1)), "a/tp b"),
    row("fft2", lambda x: (torch.fft.ifft2(torch.fft.fft2(x.double()) ** 2).real,
        torch.fft.irfft2(torch.fft.rfft2(x.double(), dim=(1, 2)), dim=(1, 2)),
        torch.fft.ifftn(torch.fft.fftn(x.double(), dim=(1, 2)) ** 2, dim=(2, 1)).real,
        torch.fft.irfftn(torch.fft.rfftn(x.double(), dim=(-1,)), dim=(-1,))), "a/tp b c"),
    row("fft of the cut", lambda x: torch.fft.fft(x.double(), dim=0).real, "a/tp b", gathers=True),
    row("fft2 of the cut", lambda x: torch.fft.fft2(x.double()).real, "d a/tp b", gathers=True),
    row("rfft of the cut", lambda x: torch.fft.rfft(x.double()).real, "b a/tp", gathers=True),
    row("fftshift of all", lambda x: torch.fft.fftshift(x), "a/tp b", gathers=True),
    row("fft of all", lambda x: torch.fft.fftn(x.double()).real, "a/tp b", gathers=True),
    row("fft of tokens' features", lambda t, s, w: torch.fft.irfft(torch.fft.rfft(ops.embed(t, w).double(), dim=1) * 2, n=4, dim=1),
        "e b", tokens=True),
    row("instance_norm", lambda x, w, b: F.instance_norm(x, weight=w, bias=b) + F.instance_norm(x), "d a/tp b", "a", "a/tp"),
    row("instance_norm of cut weights", lambda x, w: F.instance_norm(x, None, None, w), "a/tp b c", "b"),
    row("instance_norm of the cut", lambda x: F.instance_norm(x), "d b a/tp", gathers=True),
    row("local_response_norm", lambda x: F.local_response_norm(x, 2), "a/tp b c"),
    row("local_response_norm of the cut", lambda x: F.local_response_norm(x, 2), "d a/tp b", gathers=True),
    row("renorm", lambda x: x.renorm(2, 0, 0.5), "a/tp b c"),
    row("renorm along others", lambda x: x.renorm(2, 1, 0.5), "a/tp b c", gathers=True),
    row("interpolate", lambda x: (F.interpolate(x, scale_factor=2), F.interpolate(x, size=7, mode="linear")), "d a/tp b"),
    row("interpolate the cut", lambda x: F.interpolate(x, scale_factor=2), "d b a/tp", gathers=True),
    row("pools of images", lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, (2, 3)), "d a/tp b c"),
    row("pools of cut images", lambda x: F.avg_pool2d(x, 2), "d b a/tp c", gathers=True),
    row("pixel_shuffle", lambda x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2)), "a/tp b c d"),
    row("pixel_shuffle of the cut", lambda x: F.pixel_shuffle(x, 2), "a/tp b c", gathers=True),
    row("cross", lambda x, y: (torch.cross(x, y, dim=-1), torch.linalg.cross(x, y)), "a/tp kv", "one kv"),
    row("cross of the first", lambda x, y: (torch.cross(x, y), torch.linalg.cross(x, y, dim=0)), "kv a", "kv a/tp"),
    row("cross of the cut", lambda x, y: torch.cross(x, y), "kv/tp a", "kv a", gathers=True, parts=(1, 3)),
    row("trapezoid", lambda x, y: torch.trapezoid(x, dx=0.5) + torch.trapz(y=x, x=y) + torch.cumulative_trapezoid(x)[:, 0]
        + torch.trapezoid(x, x.exp(), dim=1), "a/tp b", "b"),
    row("trapezoid before", lambda x, y: torch.trapezoid(x, y, dim=0), "b a/tp", "b a"),
    row("trapezoid of the cut", lambda x: torch.trapezoid(x, dim=0), "a/tp b", gathers=True),
    row("cumulative_trapezoid of the cut", lambda x: torch.cumulative_trapezoid(x), "b a/tp", gathers=True),
    row("pairwise_distance", lambda x, y: F.pairwise_distance(x, y) + torch.pairwise_distance(x1=x, x2=y, p=1.0), "a/tp b", "a b"),
    row("pairwise_distance of the cut", lambda x, y: F.pairwise_distance(x, y, keepdim=True), "b a/tp", "b a", gathers=True),
    row("vecdot", lambda x, y: torch.linalg.vecdot(x, y) + torch.linalg.vecdot(x=x, y=y, dim=0)[:2].sum(), "a/tp b", "a b"),
    row("sdpa", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, value=v) + F.scaled_dot_product_attention(q, k, v, m)
        + F.scaled_dot_product_attention(q, k, v, attn_mask=m.sum(0, keepdim=True), scale=0.1), "a/tp b d", "a b d", "a b d", "a b one"),
    row("sdpa of cut keys", lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m[0]), "d b c", "d a/tp c", "d b a", gathers=True),
    row("linalg.norm", lambda x: torch.linalg.norm(x, dim=-1) + torch.linalg.norm(x, 1, 1, True).sum(1), "a/tp b"),
    row("quantile", lambda x: (x.double().quantile(0.3, 1), torch.nanquantile(x.double(), 0.4, dim=-1, keepdim=True),
        x.nanmedian(-1).values, integer(x).mode(1).values), "a/tp b"),
    row("nanmedian of the cut", lambda x: x.nanmedian(0).values, "a/tp b", gathers=True),
    row("mode of the cut", lambda x: integer(x).mode(-1).values, "b a/tp", gathers=True),
    row("quantiles", lambda x: torch.quantile(x.double(), torch.tensor([0.1, 0.2], dtype=torch.float64), 1), "a/tp b", gathers=True),
    row("msort", lambda x: torch.msort(x), "b a/tp"),
    row("msort the cut", lambda x: torch.msort(x), "a/tp b", gathers=True),
    row("scatter_reduce", lambda x, y: x.scatter_reduce(1, integer(y) % 4, y, "sum"), "a/tp b", "a b"),
    row("scatter_reduce into the cut", lambda x, y: x.scatter_reduce(0, integer(y) % 4, y, "sum"), "a/tp b", "a b", gathers=True),
    row("take_along_dim, broadcast", lambda x, y: torch.take_along_dim(x, integer(y) % 4, 1), "a/tp b", "one c"),
    # Other spellings
    row("synonyms of shapes", lambda x: torch.fliplr(x) + torch.flipud(x.T).T + x.narrow_copy(1, 0, 4) + x.split_with_sizes([3, 1], 1)[1]
        + x.ravel().reshape(12, 4), "a/tp b"),
    row("numpy's names", lambda x, y: torch.cat((torch.concatenate((x, y), axis=1).chunk(2, axis=1)[0], x), axis=-1),
        "a b/tp", "a b", gathers=True, parts=(1, 2, 4)),
    row("numpy's names of reductions", lambda x: torch.sort(torch.sum(x, axis=-1, keepdims=True), axis=1)[0]
        + torch.argmax(a=x, axis=-1, keepdims=True) + x.mean(axis=1, keepdims=True), "a/tp b"),
    row("numpy's names of dims", lambda x: torch.swapaxes(x, axis0=0, axis1=2).unsqueeze(axis=1)
        + torch.unbind(x, axis=2)[0][:, None].squeeze(axis=1).T, "b/tp d c", parts=(1, 2, 4)),
    row("the tensor second", lambda x, y: x.where(y > 0, y) + torch.where(condition=x > 0, input=x, other=y), "a/tp b", "a b"),
    row("var of all", lambda x: torch.var(x, False) + x.std(True) + torch.var_mean(x, False)[0], "a b/tp", gathers=True, parts=(1, 2, 4)),
    row("no dims are all", lambda x: x.sum(()) + torch.sum(x, dim=[]), "a b/tp", parts=(1, 2, 4)),
    row("no dims are all, gathered", lambda x: x.amax(()) + x.mean(dim=[]) + torch.linalg.vector_norm(x, dim=()), "a b/tp",
        gathers=True, parts=(1, 2, 4)),
    row("names of sizes", lambda x: x[:, None].expand(size=(12, 3, 4)) + x.reshape(shape=(12, 1, 4)), "a/tp b"),
    row("synonyms", lambda x, y: torch.clip(x, -0.5, 0.5) + x.clip(min=y) + torch.arctan(x) + torch.less_equal(x, y)
        + torch.special.expit(x) + torch.special.softmax(x, 0), "a/tp b", "b"),
    # The model's own
    row("embed rows", lambda t, s, w: ops.embed(t, w), "e/tp b", tokens=True),
    row("embed columns", lambda t, s, w: ops.embed(t, w), "e a/tp", tokens=True),
    row("embed cut tokens", lambda x, w: ops.embed(integer(x), w), "a/tp b", "e b"),
    row("experts", mixed, "c b", "a e/tp b", "a e/tp b", "a b e/tp"),
    row("experts with biases", lambda x, g, u, d, gb, ub, db: mixed(
        x, g, u, d, gate_bias=gb, up_bias=ub, down_bias=db, **OAI),
        "c b", "a e/tp b", "a e/tp b", "a b e/tp", "a e/tp", "a e", "a b"),
    row("experts of ranks", lambda x, g, u, d, gb, db: mixed(
        x, g, u, d, gate_bias=gb, down_bias=db, activation="gelu"),
        "c b", "a/tp c b", "a/tp c b", "a b c", "a c", "a/tp b"),
    row("experts of cut tokens", mixed, "e/tp b", "a c b", "a c b", "a b c"),
    row("experts of cut features", mixed, "c b/tp", "a c b", "a c b", "a b c", gathers=True,
        parts=(1, 2, 4)),
    row("rope", lambda t, s, q, k: ops.rope(t[:, None, None] * q, t[:, None, None] * k, s, theta=1e4),
        "heads/tp hd", "heads hd", tokens=True),
    row("attention", lambda t, s, q, k, v: ops.attention(
        torch.sin(t + 1.0)[:, None, None] * q, torch.cos(s + 1.0)[:, None, None] * k,
        torch.sin(s + 2.0)[:, None, None] * v),
        "heads/tp hd", "heads/tp hd", "heads/tp hd", tokens=True),
    row("attention grouped", lambda t, s, q, k, v: ops.attention(
        torch.sin(t + 1.0)[:, None, None] * q, torch.cos(s + 1.0)[:, None, None] * k,
        torch.sin(s + 2.0)[:, None, None] * v),
        "heads/tp hd", "kv/tp hd", "kv/tp hd", tokens=True, parts=(1, 3)),
    row("attention one kv head", lambda t, s, q, k, v: ops.attention(
        torch.sin(t + 1.0)[:, None, None] * q, torch.cos(s + 1.0)[:, None, None] * k,
        torch.sin(s + 2.0)[:, None, None] * v),
        "heads/tp hd", "one/tp hd", "one/tp hd", tokens=True),
    row("attention whole kv", lambda t, s, q, k, v: ops.attention(
        torch.sin(t + 1.0)[:, None, None] * q, torch.cos(s + 1.0)[:, None, None] * k,
        torch.sin(s + 2.0)[:, None, None] * v),
        "heads/tp hd", "kv hd", "kv hd", tokens=True, parts=(1, 3)),
    row("attention sinks", lambda t, s, q, k, sinks: ops.attention(
        torch.sin(t + 1.0)[:, None, None] * q, torch.cos(s + 1.0)[:, None, None] * k,
        torch.sin(s + 2.0)[:, None, None] * k, sinks=sinks,
        alibi_slopes=tuple(0.1 * i for i in range(1, 13))),
        "heads/tp hd", "heads/tp hd", "heads", tokens=True),
    row("latent attention", latent, "heads/tp hd", "heads/tp d", "heads/tp c b", "b", "one d",
        tokens=True),
    row("latent attention by its weights", latent, "heads hd", "heads d", "heads/tp c b", "b",
        "one d", tokens=True),
    row("latent attention of a cut latent", latent, "heads hd", "heads d", "heads c b", "b/tp",
        "one d", tokens=True, gathers=True, parts=(1, 2, 4)),
    row("cross_entropy", lambda h, w: ops.cross_entropy(h, w, 2 * torch.arange(6), reduction="none",
        chunk=4), "c b", "a/tp b"),
    row("cross_entropy of everything", lambda h, w: ops.cross_entropy(h, w, 2 * torch.arange(6),
        reduction="none", mask=torch.arange(6) % 4 > 0, label_smoothing=0.1, z_loss=0.01, scale=0.7,
        softcap=2.0), "c b", "a/tp b"),
    row("mean cross_entropy", lambda h, w: ops.cross_entropy(h, w, 2 * torch.arange(6)), "c b",
        "a/tp b", gathers=True),
    # No rule: gathered, and right
    row("no rule", lambda x: torch.kron(x, x), "a/tp b", gathers=True),
]  # fmt: skip


USED: dict[str, set[Any]] = {}  # row that ran -> the functions it is made of


def functions_of(program: Program) -> set[Any]:
    return {n.target for n in program.root.graph.nodes if n.op == "call_function"}


def sharing_memory(program: Program, weights: Any, tokens: Tensor, positions: Tensor) -> list[Any]:
    """Nodes of a program whose results are memory of an operand's."""
    own = evaluate.local_weights(program, weights, Simulated(1))
    memory: dict[Any, set[int]] = {
        node: {own[str(node.target)][0].untyped_storage().data_ptr()}
        for node in program.root.graph.nodes
        if node.op == "get_attr"
    }
    found = []

    def seen(node: Any, values: list[Any]) -> None:
        leaves = [leaf for leaf in fm.tree.leaves(values) if isinstance(leaf, Tensor)]
        memory[node] = {leaf.untyped_storage().data_ptr() for leaf in leaves} - {0}
        if any(memory[node] & memory.get(n, set()) for n in node.all_input_nodes):
            found.append(node)

    evaluate.run(program, own, tokens, positions, seen=seen)
    return found


@pytest.mark.parametrize("case", ROWS, ids=lambda row: row.name)
def test_rule(case: Row):
    model = case.model
    program = trace(model)
    local = partition(program)
    USED[case.name] = functions_of(local) | functions_of(program)
    assert bool(local.gathered) == case.gathers, local.gathered
    assert tuple(n for n in (1, 2, 3, 4) if allowed(local, n)) == case.parts
    weights, (tokens, positions) = weights_of(model), inputs_of(5)
    for parts in case.parts:
        check_on_ranks(program, local, parts, weights, tokens, positions)
    shared = sharing_memory(program, weights, tokens, positions)
    assert not [n.target for n in shared if n.target in RULES and not may_share_memory(n)]


def test_every_rule_has_a_row():
    """Rows that ran in this process are known; of the others, as many as it takes are traced."""
    missing = set(RULES) - set().union(*USED.values())
    rest = [] if not missing else [trace(case.model) for case in ROWS if case.name not in USED]
    for program in rest:
        missing -= functions_of(program)
    for program in rest:  # some rules are for steps of others
        if missing:
            missing -= functions_of(partition(program))
    names = [getattr(target, "__name__", target) for target in missing]
    assert not names, f"rules without a row: {names}"
