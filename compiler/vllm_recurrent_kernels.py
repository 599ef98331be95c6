"""The engine's kernels of recurrences on a CPU, for emitted files to carry along.

`compiler.recurrent_kernels` says which of them computes what.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from vllm import _custom_ops

from compiler.vllm_recurrent_batch import BatchedRequests


class ShortConvKernel:
    """vLLM's short convolutions on a CPU: x, (weight, bias), over the last tokens.

    For bfloat16 and at most four columns it has those of its gated delta rule, which are many times
    faster than the ones of its own short convolution. They want four columns: others are zero.
    """

    @staticmethod
    def fits(caches: list[torch.Tensor], xs: list, params: list) -> bool:
        dtype = xs[0].dtype
        known = dtype in (torch.bfloat16, torch.float16, torch.float32)
        return known and all(t.dtype == dtype for t in (*caches, *params))

    @staticmethod
    def is_fast(weight: torch.Tensor) -> bool:
        narrow = weight.shape[1] <= 4 and weight.shape[0] % 32 == 0
        return narrow and weight.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()

    @staticmethod
    def step(caches: list, batch: BatchedRequests, xs: list, params: list) -> list[torch.Tensor]:
        (cache,), (x,), (weight, *bias) = caches, xs, params
        x, bias = x.contiguous(), bias[0] if bias else None
        # What the fast one wants to be laid out anew takes 30 us, whatever the size.
        if x.numel() <= 8192 or not ShortConvKernel.is_fast(weight):
            places = batch.decodes_int32
            y = _custom_ops.causal_conv1d_update_cpu_vec(
                x, cache.transpose(1, 2), weight.contiguous(), bias, None, places, None, -1
            )
            return [y]
        states, weight, rows = ShortConvKernel.widened(cache[batch.decodes], weight)
        y = _custom_ops.causal_conv1d_update_cpu(
            x, states.transpose(1, 2), weight, bias, False, rows, False
        )
        cache[batch.decodes] = states[:, -cache.shape[1] :]
        return [y]

    @staticmethod
    def prefill(
        caches: list, batch: BatchedRequests, xs: list, params: list, results: list
    ) -> None:
        (cache,), (x,), (weight, *bias) = caches, xs, params
        bias = bias[0] if bias else None
        places = batch.places[batch.num_decodes :]
        if not ShortConvKernel.is_fast(weight):
            for i, (first, last) in enumerate(batch.prompts):
                first, last = first - batch.num_decodes, last - batch.num_decodes
                rows = torch.cat((cache[places[i]], x[first:last]))
                y = F.conv1d(rows.t()[None], weight[:, None], bias, groups=weight.shape[0])
                results[0][first:last] = y[0].t()
                cache[places[i]] = rows[len(rows) - cache.shape[1] :]
            return
        states, weight, rows = ShortConvKernel.widened(cache[places], weight)
        y = _custom_ops.causal_conv1d_fwd_cpu(
            x.contiguous().t(),
            weight,
            bias,
            states.transpose(1, 2),
            batch.begins,
            rows,
            torch.ones_like(rows, dtype=torch.bool),
            False,
            False,
        )
        results[0].copy_(y.t())
        cache[places] = states[:, -cache.shape[1] :]

    @staticmethod
    def widened(
        states: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States and weights of four columns, and a number for each request."""
        more = 4 - weight.shape[1]
        rows = torch.arange(len(states), dtype=torch.int32)
        if not more:
            return states, weight.contiguous(), rows
        return F.pad(states, (0, 0, more, 0)), F.pad(weight, (more, 0)), rows


class StateSpaceKernel:
    """vLLM's kernels of Mamba-2 on a CPU: x, dt, B, C, (A, D)."""

    @staticmethod
    def fits(caches: list[torch.Tensor], xs: list, params: list) -> bool:
        x, dt, B, C = xs
        known = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        wide = all(t.dtype == torch.float32 for t in (*caches, dt, *params))
        return known and wide and B.dtype == C.dtype == x.dtype

    @staticmethod
    def step(caches: list, batch: BatchedRequests, xs: list, params: list) -> list[torch.Tensor]:
        (cache,), (x, dt, B, C), (A, *D) = caches, xs, params
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        _custom_ops.selective_state_update_cpu(
            cache,
            x.contiguous(),
            dt[:, :, None].expand(x.shape),
            A[:, None, None].expand(cache.shape[1:]),
            B.contiguous(),
            C.contiguous(),
            D[0][:, None].expand(x.shape[1:]) if D else None,
            None,
            None,
            False,
            batch.decodes_int32,
            None,
            -1,
            y,
            None,
            None,
        )
        return [y]

    @staticmethod
    def prefill(
        caches: list, batch: BatchedRequests, xs: list, params: list, results: list
    ) -> None:
        (cache,), (x, dt, B, C), (A, *D) = caches, xs, params
        places = batch.places[batch.num_decodes :]
        states = cache[places]
        _custom_ops.mamba_chunk_scan_fwd_cpu(
            results[0],
            states,
            x.contiguous(),
            dt.contiguous(),
            A.contiguous(),
            B.contiguous(),
            C.contiguous(),
            D[0].contiguous() if D else None,
            None,
            batch.begins,
        )
        cache[places] = states


class DeltaRuleKernel:
    """vLLM's chunked gated delta rule on a CPU, for one token too: q, k, v, g, beta.

    The one for a token takes gates before their functions, and those rounded: a decay near 1 would
    lose its digits. Queries are scaled by the kernel, which is taken back.
    """

    unit = False  # whether the kernel takes q and k at length 1

    @classmethod
    def fits(cls, caches: tuple[torch.Tensor, ...], xs: list, params: list) -> bool:
        (cache,), (q, k, v, g, beta) = caches, xs
        narrow = all(t.dtype == torch.bfloat16 for t in (q, k, v, beta))
        sized = cache.shape[-1] == cache.shape[-2] and cache.shape[-1] in (64, 128)
        return narrow and sized and cache.dtype == g.dtype == torch.float32

    @classmethod
    def step(
        cls, caches: tuple, batch: BatchedRequests, xs: list, params: list
    ) -> list[torch.Tensor]:
        starts = torch.arange(batch.num_decodes + 1, dtype=torch.int32)
        y = cls.run(caches[0], batch.decodes_int32, starts, xs)
        return [y.mul_(xs[0].shape[-1] ** 0.5)]

    @classmethod
    def prefill(
        cls, caches: tuple, batch: BatchedRequests, xs: list, params: list, results: list
    ) -> None:
        places = batch.places[batch.num_decodes :].int()
        y = cls.run(caches[0], places, batch.begins, xs)
        torch.mul(y, xs[0].shape[-1] ** 0.5, out=results[0])

    @classmethod
    def run(
        cls,
        cache: torch.Tensor,
        places: torch.Tensor,
        starts: torch.Tensor,
        xs: list,
    ) -> torch.Tensor:
        q, k, v, g, beta = (x.contiguous()[None] for x in xs)
        y, _ = _custom_ops.chunk_gated_delta_rule_cpu(
            q, k, v, g, beta, cache, True, starts, False, cls.unit, places, 1e-6
        )
        return y[0]


class UnitDeltaRuleKernel(DeltaRuleKernel):
    """The same, of queries and keys at length 1."""

    unit = True
