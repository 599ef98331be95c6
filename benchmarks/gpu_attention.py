"""How fast `ops.attention` is, against the best kernel of the machine, called directly.

Causal, bfloat16, 16384 tokens in all, 2048 features in all heads. Every side is a CUDA graph, so
that the figures are of kernels; "python overhead" is what is left out. The FLOP are those of the
visible half of the scores: 2 products forward, 5 backward.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_time import BF16, DEVICE, graphed, progress, seconds, turns
from benchmarks.table import Row, compare
from funcmodels import ops

TOKENS, FEATURES = 16384, 2048
SEQS = (512, 1024, 2048, 4096, 8192, 16384)
DIMS = (64, 128)
aten = torch.ops.aten

Step = Callable[[], Any]
Side = tuple[Step, Step]  # forward alone; forward and backward


def speed(rate: float, *, tokens: int, seqs: tuple[int, ...], count: int) -> list[Row]:
    """Rows of TFLOP/s; `rate` is the chip's in FLOP/s for matrix products."""
    rows = []
    for dim in DIMS:
        for seq in seqs:
            rows += _dense(rate, dim, seq, tokens, count)
            progress(f"attention, d {dim}, sequence {seq}")
        rows += _packed(dim, tokens, count)
    return [*rows, _overhead(tokens)]


def _dense(rate: float, dim: int, seq: int, tokens: int, count: int) -> list[Row]:
    shape = (tokens // seq, seq, FEATURES // dim, dim)
    q, k, v, g = (torch.randn(shape, device=DEVICE).to(BF16) for _ in range(4))
    flop = 2 * tokens * seq * FEATURES / 2  # of one product
    sides = {name: make(q, k, v, g) for name, make in _makers(seq).items()}
    what = f"d {dim}, sequence {seq}"
    forward = _rates({n: s[0] for n, s in sides.items()}, 2 * flop, count)
    both = _rates({n: s[1] for n, s in sides.items()}, 7 * flop, count)
    return [*_rows(f"forward, {what}", forward, rate), *_rows(f"both, {what}", both, rate)]


def _packed(dim: int, tokens: int, count: int) -> list[Row]:
    """Documents of different lengths in rows of `tokens`, four of them.

    Not as graphs: a graph would be bound to one batch's documents, and so `ops.attention` masks in
    one. The documents are long enough to hide Python.
    """
    seq = tokens
    parts = [seq // 2, seq // 4, seq // 8, seq // 16, seq // 16]
    shape = (4, seq, FEATURES // dim, dim)
    q, k, v, g = (torch.randn(shape, device=DEVICE).to(BF16) for _ in range(4))
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(parts)]).to(DEVICE)
    ids = ids.expand(shape[:2]).contiguous()
    lengths = torch.tensor(parts * shape[0])
    starts = torch.cat((torch.zeros(1), lengths.cumsum(0))).int().to(DEVICE)
    flop = 2 * FEATURES * lengths.square().sum().item() / 2
    sides = {"ours": _ours(q, k, v, g, ids)}
    if DEVICE.type == "cuda":
        flat = [t.flatten(0, 1) for t in (q, k, v, g)]
        sides["torch flash"] = _torch_flash(*flat, starts, parts[0])
        if find_spec("flash_attn"):
            sides["flash-attn-4"] = _flash_attn(*flat, starts, parts[0])
    forward = _rates({n: s[0] for n, s in sides.items()}, 2 * flop, count, graph=False)
    both = _rates({n: s[1] for n, s in sides.items()}, 7 * flop, count, graph=False)
    return [
        row
        for name, found in (("forward", forward), ("both", both))
        for row in _rows(f"{name}, d {dim}, packed to {seq}, no graph", found, None)
    ]


def _rates(
    sides: dict[str, Step], flop: float, count: int, *, graph: bool = True
) -> dict[str, list[float]]:
    """TFLOP/s of each turn of each side."""
    # Without a graph a turn begins with Python's time, so that it should be a long one.
    at_least = 0.02 if graph else 0.2
    calls = {n: graphed(fn) if graph else fn for n, fn in sides.items()}
    times = turns(calls, count, at_least=at_least)
    return {name: [flop / t / 1e12 for t in values] for name, values in times.items()}


def _rows(what: str, found: dict[str, list[float]], rate: float | None) -> list[Row]:
    ours = found["ours"]
    peers = {name: values for name, values in found.items() if name != "ours"}
    rows = [compare(what, ours, peers, "TFLOP/s")] if peers else []
    if rate is not None:
        share = median(ours) * 1e12 / rate
        rows.append(Row(what, median(ours), rate / 1e12, "matrix rate", share, "TFLOP/s"))
    return rows


def _overhead(tokens: int) -> Row:
    """Seconds of Python for one forward and backward: of a few tokens, which cost no time."""
    q, k, v, g = (torch.randn(1, 128, 4, 64, device=DEVICE).to(BF16) for _ in range(4))
    ours, direct = _ours(q, k, v, g)[1], _sdpa(q, k, v, g)[1]
    for fn in (ours, direct):
        fn()
    a, b = (median(seconds(fn, 20) for _ in range(9)) * 1e6 for fn in (ours, direct))
    return Row("python overhead, forward and backward", a, b, "SDPA with autograd", b / a, "µs")


def _makers(seq: int) -> dict[str, Callable[..., Side]]:
    """ours, and every kernel of the machine."""
    if DEVICE.type == "cpu":
        return {"ours": _ours, "SDPA": _sdpa}
    makers = {"ours": _ours, "cuDNN": _cudnn, "torch flash": _torch_flash}
    if find_spec("flash_attn"):
        makers["flash-attn-4"] = _flash_attn
    if seq == 4096:  # it is compiled for each shape, and never the fastest
        makers["FlexAttention"] = _flex
    return makers


def _ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, ids: Tensor | None = None) -> Side:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]

    def forward() -> Tensor:
        return ops.attention(q, k, v, segment_ids=ids)

    def both() -> Any:
        return torch.autograd.grad(ops.attention(*leaves, segment_ids=ids), leaves, g)

    return forward, both


def _sdpa(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Side:
    leaves = [t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    grad = g.transpose(1, 2)
    return (
        lambda: attend(*(t.detach() for t in leaves)),
        lambda: torch.autograd.grad(attend(*leaves), leaves, grad),
    )


def _cudnn(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Side:
    q, k, v, g = (t.transpose(1, 2) for t in (q, k, v, g))
    seq = q.shape[2]

    def forward() -> Any:
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)

    def both() -> Any:
        out, lse, _, _, _, _, seed, offset, _ = forward()
        return aten._scaled_dot_product_cudnn_attention_backward(
            g, q, k, v, out, lse, seed, offset, None, None, None, seq, seq, 0.0, True
        )

    return forward, both


def _torch_flash(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, at: Tensor | None = None, longest: int | None = None
) -> Side:
    n = q.shape[1] if longest is None else longest

    def forward() -> Any:
        return aten._flash_attention_forward(q, k, v, at, at, n, n, 0.0, True, False)

    def both() -> Any:
        out, lse, seed, offset, _ = forward()
        return aten._flash_attention_backward(
            g, q, k, v, out, lse, at, at, n, n, 0.0, True, seed, offset
        )

    return forward, both


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, at: Tensor | None = None, longest: int | None = None
) -> Side:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    where: dict[str, Any] = {
        "causal": True, "cu_seqlens_q": at, "cu_seqlens_k": at,
        "max_seqlen_q": longest, "max_seqlen_k": longest,
    }  # fmt: skip

    def forward() -> Any:
        return _flash_attn_fwd(q, k, v, return_lse=True, **where)

    def both() -> Any:
        out, lse, *_ = forward()
        return _flash_attn_bwd(q, k, v, out, g, lse, **where)

    return forward, both


def _flex(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Side:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seq = q.shape[1]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, seq, seq, device=DEVICE.type)
    attend = torch.compile(partial(flex_attention, block_mask=mask), dynamic=False)
    leaves = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v)]
    plain = [t.detach() for t in leaves]
    grad = g.transpose(1, 2).contiguous()
    return lambda: attend(*plain), lambda: torch.autograd.grad(attend(*leaves), leaves, grad)
