"""What a cross-entropy needs of each token's logits, and its derivatives, in chunks of tokens.

With z = h Tᵀ, the logits are x = scale · z, or softcap · tanh(scale · z / softcap). Of each token

    lse = log(Σ_v exp(x_v))        target = x_t        mean = Σ_v x_v / vocab

All are in float32 or better, of a product in the dtype of h. Nothing of size tokens × vocab
outlives a chunk, but in `second`, which is for derivatives beyond the first. Dims in front of the
tokens are those of vmap; a table may have 1s there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode

# Elements of a chunk's logits, 128 MB in float32: enough for a fast product, little for a model.
CHUNK = 1 << 25
# Elements for each thread of a CPU that all is done with before the next: 1 MB, which stays in its
# cache. Of 49,152 logits a token, that takes a third of the time of a whole chunk at once.
BLOCK = 1 << 18


class Stats(NamedTuple):
    """Of each token, (*b, n); or derivatives by them, or tangents of them."""

    lse: Tensor
    target: Tensor
    mean: Tensor


class Logits(NamedTuple):
    """The static arguments."""

    chunk: int | None
    scale: float
    softcap: float | None
    means: bool  # whether anyone asks for the mean; it is zero otherwise


class Weights(NamedTuple):
    """How a token's loss is made of its `Stats`."""

    label_smoothing: float
    z_loss: float


def losses(s: Stats, w: Weights) -> Tensor:
    """Cross-entropy of each token: lse - (1 - ε) x_t - ε mean + z lse²."""
    out = s.lse - (1 - w.label_smoothing) * s.target
    if w.label_smoothing:
        out = out - w.label_smoothing * s.mean
    return out + w.z_loss * s.lse.square() if w.z_loss else out


def by_stats(grad: Tensor, lse: Tensor, w: Weights) -> Stats:
    """The gradient of Σ grad · losses by `Stats`."""
    by_lse = grad + 2 * w.z_loss * lse * grad if w.z_loss else grad
    return Stats(by_lse, -(1 - w.label_smoothing) * grad, -w.label_smoothing * grad)


def stats(hidden: Tensor, table: Tensor, targets: Tensor, o: Logits) -> Stats:
    """Of hidden (*b, n, e), table (*b, v, e) and targets (*b, n)."""
    found = []
    for part in parts(hidden, table, o):
        x, _ = logits(hidden[..., part, :], table, o)
        found.append(stats_of(x, targets[..., part], means=o.means))
    return Stats(*(torch.cat(each, -1) for each in zip(*found, strict=True)))


def stats_of(x: Tensor, targets: Tensor, *, means: bool) -> Stats:
    """Of the logits (*b, c, v) of a chunk."""
    return Stats(x.logsumexp(-1), picked(x, targets), mean_of(x, means))


def picked(x: Tensor, targets: Tensor) -> Tensor:
    """The logit of each target."""
    return x.gather(-1, targets[..., None].expand(*x.shape[:-1], 1)).squeeze(-1)


def stats_jvp(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    hidden_t: Tensor | None,
    table_t: Tensor | None,
    o: Logits,
) -> Stats:
    """The tangents of `stats` along those of hidden and table; None is zero."""
    found = []
    for part in parts(hidden, table, o):
        h = hidden[..., part, :]
        x, cap = logits(h, table, o)
        x_t = _tangent(h, table, None if hidden_t is None else hidden_t[..., part, :], table_t, o)
        x_t = x_t if cap is None else x_t * cap[0]
        mean = (torch.softmax(x, -1) * x_t).sum(-1)
        found.append(Stats(mean, picked(x_t, targets[..., part]), mean_of(x_t, o.means)))
    return Stats(*(torch.cat(each, -1) for each in zip(*found, strict=True)))


def first(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    by: Stats,
    o: Logits,
    *,
    needs: tuple[bool, bool] = (True, True),
    in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of Σ by · stats by hidden and table, those that are needed.

    With `in_place`, memory for the logits of a chunk once; without, it can be differentiated.
    """
    gradient = Gradient(hidden, table, needs)
    for part in parts(hidden, table, o):
        x, cap = logits(hidden[..., part, :], table, o)
        mine = Stats(*(each[..., part] for each in by))
        exps, total, _ = exponentials(x, in_place=in_place)
        by_x = by_logits(exps, total, targets[..., part], mine, o, in_place=in_place)
        gradient.add(part, by_x if cap is None else by_x * cap[0], o)
    return gradient.result()


def exponentials(x: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor, Tensor]:
    """exp(x - max), its sum, and lse; `in_place` the first takes the place of x."""
    top = x.detach().amax(-1, keepdim=True)
    exps = x.sub_(top).exp_() if in_place else (x - top).exp()
    total = exps.sum(-1)
    return exps, total, total.log() + top.squeeze(-1)


def by_logits(
    exps: Tensor, total: Tensor, targets: Tensor, by: Stats, o: Logits, *, in_place: bool
) -> Tensor:
    """The gradient of Σ by · stats by the logits of a chunk; `in_place` it takes that of exps."""
    at = targets[..., None].expand(*exps.shape[:-1], 1)
    by_target = by.target[..., None].expand(at.shape).to(exps.dtype)
    factor = (by.lse / total)[..., None]
    if not in_place:
        grad = exps * factor + by.mean[..., None] / exps.shape[-1]
        return grad.scatter_add(-1, at, by_target)
    grad = exps.mul_(factor)
    grad = grad.add_(by.mean[..., None] / exps.shape[-1]) if o.means else grad
    return grad.scatter_add_(-1, at, by_target)


class Gradient:
    """Gradients by hidden and table, to which chunks of those by the logits are added."""

    def __init__(self, hidden: Tensor, table: Tensor, needs: tuple[bool, bool]) -> None:
        self.operands = hidden, table
        self.needs = needs
        self.hidden: list[Tensor] = []
        self.table: Tensor | None = None

    def add(self, part: slice, grad: Tensor, o: Logits) -> None:
        """A chunk's: grad (*b, c, v) by scale · z."""
        hidden, table = self.operands
        grad = (grad if o.scale == 1 else grad * o.scale).to(hidden.dtype)
        if self.needs[0]:
            self.hidden.append(_times(grad, table))
        if not self.needs[1]:
            return
        h = hidden[..., part, :]
        wide = torch.promote_types(grad.dtype, torch.float32)
        if self.table is not None and grad.dim() == 2 and grad.dtype == wide:
            self.table.addmm_(grad.mT, h)  # no second table for a chunk
        else:
            new = sum_to_table(grad, h, table)
            # fp32: each chunk adds to the sum of all before it; the first is often the only one.
            self.table = new if self.table is None else self.table.to(wide).add_(new)

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        hidden, table = self.operands
        by_hidden = torch.cat(self.hidden, -2).to(hidden.dtype) if self.needs[0] else None
        return by_hidden, None if self.table is None else self.table.to(table.dtype)


def second(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    hidden_t: Tensor | None,
    table_t: Tensor | None,
    by: Stats,
    o: Logits,
) -> tuple[Tensor, Tensor]:
    """The gradients by hidden and table of Σ by · stats_jvp: a Hessian times the tangents.

    Plain differentiable code, which holds the logits of all tokens.
    """
    x, cap = logits(hidden, table, o)
    z_t = _tangent(hidden, table, hidden_t, table_t, o)
    probs = torch.softmax(x, -1)
    x_t = z_t if cap is None else z_t * cap[0]
    hot = torch.zeros_like(x).scatter(-1, targets[..., None].expand(*x.shape[:-1], 1), 1.0)
    by_x_t = (
        by.lse[..., None] * probs + by.target[..., None] * hot + by.mean[..., None] / x.shape[-1]
    )
    by_z = by.lse[..., None] * probs * (x_t - (probs * x_t).sum(-1, keepdim=True))
    by_z_t = by_x_t
    if cap is not None:
        by_z = by_z * cap[0] + by_x_t * cap[1] * z_t
        by_z_t = by_x_t * cap[0]
    by_z, by_z_t = ((g * o.scale).to(hidden.dtype) for g in (by_z, by_z_t))
    by_hidden, by_table = _times(by_z, table), sum_to_table(by_z, hidden, table)
    if table_t is not None:
        by_hidden = by_hidden + _times(by_z_t, table_t)
    if hidden_t is not None:
        by_table = by_table + sum_to_table(by_z_t, hidden_t, table)
    return by_hidden.to(hidden.dtype), by_table.to(table.dtype)


def parts(hidden: Tensor, table: Tensor, o: Logits) -> Iterator[slice]:
    """Chunks of the tokens; one, of none, where there are none."""
    n, rows = hidden.shape[-2], hidden.shape[:-2].numel()
    if hidden.is_meta:  # nothing is computed: a tracer asks for shapes, of very many tokens
        yield slice(0, n)
        return
    step = o.chunk or max(1, CHUNK // max(1, rows * table.shape[-2]))
    if o.chunk is None and step > 64:
        step -= step % 64  # whole tiles of a matrix product
    # Of a symbolic n, the number of chunks is all that is asked: what is compiled serves other n.
    last = max(1, -(-n // step)) - 1
    for i in range(last):
        yield slice(i * step, (i + 1) * step)
    yield slice(last * step, n)


def blocks(z: Tensor) -> Iterator[slice]:
    """Runs of the tokens of a chunk, on a CPU; compilers and GPUs are better given all at once."""
    n, rows = z.shape[-2], z.shape[:-2].numel()
    if z.device.type != "cpu" or is_fake(z) or get_proxy_mode() is not None:
        yield slice(0, n)
        return
    step = max(1, BLOCK * torch.get_num_threads() // max(1, rows * z.shape[-1]))
    for start in range(0, max(n, 1), step):
        yield slice(start, min(start + step, n))


def logits(h: Tensor, table: Tensor, o: Logits) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The logits of a chunk, and of the softcap the first and second derivative by scale · z."""
    return capped(product(h, table), o)


def capped(z: Tensor, o: Logits) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The same, of a product; x may have its memory."""
    x = z.to(torch.promote_types(z.dtype, torch.float32))
    if o.scale != 1:
        x = x * o.scale
    if o.softcap is None:
        return x, None
    tanh = torch.tanh(x / o.softcap)
    slope = 1 - tanh * tanh
    return o.softcap * tanh, (slope, -2 / o.softcap * tanh * slope)


def mean_of(x: Tensor, means: bool) -> Tensor:
    """The mean of each token's logits, if it is asked for."""
    return x.mean(-1) if means else x.new_zeros(x.shape[:-1])


def _tangent(
    h: Tensor, table: Tensor, h_t: Tensor | None, table_t: Tensor | None, o: Logits
) -> Tensor:
    """The tangent of scale · z."""
    wide = torch.promote_types(h.dtype, torch.float32)
    out = None
    if h_t is not None:
        out = product(h_t, table).to(wide)
    if table_t is not None:
        more = product(h, table_t).to(wide)
        out = more if out is None else out + more
    if out is None:
        return torch.zeros(*h.shape[:-1], table.shape[-2], dtype=wide, device=h.device)
    return out * o.scale


def product(h: Tensor, table: Tensor) -> Tensor:
    """h tableᵀ: (*b, c, e), (*b, v, e) -> (*b, c, v); one table for all is not copied for each."""
    if table.shape[:-2].numel() == 1:
        return h @ table.reshape(table.shape[-2:]).mT
    return h @ table.mT


def _times(grad: Tensor, table: Tensor) -> Tensor:
    """grad table: (*b, c, v), (*b, v, e) -> (*b, c, e)."""
    if table.shape[:-2].numel() == 1:
        return grad @ table.reshape(table.shape[-2:])
    return grad @ table


def sum_to_table(grad: Tensor, h: Tensor, table: Tensor) -> Tensor:
    """gradᵀ h in the shape of the table, summed over dims of vmap in which it is one for all."""
    if table.shape[:-2].numel() == 1:
        found = grad.reshape(-1, grad.shape[-1]).mT @ h.expand(*grad.shape[:-1], -1).reshape(
            -1, h.shape[-1]
        )
        # No view: who adds to a gradient in place asks whether anything else has its memory.
        return found if found.shape == table.shape else found.reshape(table.shape)
    found = grad.mT @ h
    dims = [i for i in range(found.dim() - 2) if table.shape[i] == 1 and found.shape[i] != 1]
    return found.sum(dims, keepdim=True) if dims else found
