"""Recurrences in the engine, for emitted files to carry along: functions are copied as they stand.

They may use the names that the file imports, and nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm import _custom_ops
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout


class BatchedRequests:
    """Where a step's requests have their states and tokens: found once, for all layers of a kind.

    The engine puts requests with one token before others.

    Args:
        source: the engine's places.
        num_decodes: how many requests have one token, of those before the first that has more.
        prompts: first token and the one after the last of each other request.
        num_tokens: of all requests.
        places: of all requests, int64; `decodes`: of the first num_decodes, `decodes_int32` too.
        new: places of requests that have only begun.
        begins: where the tokens of prompts begin and end, counted from the first of them.
    """

    def __init__(self, metadata: Any) -> None:
        starts = metadata.query_start_loc.tolist()
        spans = [(starts[i], starts[i + 1]) for i in range(len(starts) - 1)]
        lengths = [last - first for first, last in spans]
        n = next((i for i, length in enumerate(lengths) if length != 1), len(lengths))
        self.source = metadata.state_indices_tensor
        self.num_decodes, self.num_tokens = n, starts[-1]
        self.prompts = spans[n:]
        self.places = self.source[: len(lengths)].long()
        self.decodes = self.places[:n]
        self.decodes_int32 = self.decodes.int()
        seen = zip(metadata.seq_lens.tolist(), lengths, self.places.tolist(), strict=False)
        self.new = [place for total, length, place in seen if total == length]
        self.begins = metadata.query_start_loc[n : len(lengths) + 1].int() - n


class RecurrentBackend(LinearAttentionBackend):
    """The engine's linear attention, in the one layout of caches that attention on a CPU has.

    So stages agree of which one holds attention and another one does not.
    """

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        return (KVCacheLayout.LBHNC,) if current_platform.is_cpu() else None


class Recurrent(nn.Module, MambaBase):
    """A recurrence: its state lies in the engine's cache, one for each request.

    The engine gives each layer a page for each request, all of one size. So those of one module
    share one, as the convolutions and the state space of a Mamba-2 layer: to the engine, the first
    of them is the layer.

    Requests of which one token is new take a step together. The prompts of others go through the
    engine's kernel together, or through the chunked form one after the other, or step by step
    together. A request begins with the declared state, whatever its place in the cache held before.

    Args:
        step: of states and one token of each of some requests; what is new of both.
        chunked: the same for some tokens of one request; or None.
        state: shape of one request's, dtype and initial value of each tensor.
        results: shape of one token's and dtype of each.
        chunk: the most tokens for `chunked` at once.
        kernel: what the engine has for the same recurrence; or None.
    """

    def __init__(
        self,
        *,
        step: Callable[..., tuple[torch.Tensor, ...]],
        state: list[tuple[tuple[int, ...], torch.dtype, float]],
        results: list[tuple[tuple[int, ...], torch.dtype]],
        vllm_config: VllmConfig,
        prefix: str,
        chunked: Callable[..., tuple[torch.Tensor, ...]] | None = None,
        chunk: int = 1,
        kernel: Any = None,
    ) -> None:
        super().__init__()
        if vllm_config.speculative_config is not None:
            raise ValueError(
                f"{prefix} cannot take back tokens: its state has one place a request\n"
                "  got:  speculative decoding\n"
                "  fix:  speculative_config=None"
            )
        self.step, self.chunked, self.chunk = step, chunked, chunk
        self.kernel: Any = kernel if current_platform.is_cpu() else None
        self.kernel_fits: bool | None = None  # not known before it is given operands
        self.state, self.results, self.prefix = state, results, prefix
        self.states: list[torch.Tensor] = []
        self.kv_cache = (torch.tensor([]),)
        layers = vllm_config.compilation_config.static_forward_context
        place = prefix.rpartition(".")[0]
        beside = [
            layer
            for name, layer in layers.items()
            if isinstance(layer, Recurrent) and name.rpartition(".")[0] == place
        ]
        self.together: list[Recurrent] = beside[0].together if beside else []
        self.together.append(self)
        layers[prefix] = self
        if not hasattr(torch.ops.vllm, "funcmodels_recurrent"):
            direct_register_custom_op(
                "funcmodels_recurrent", run_recurrent, ["results"], lambda *args: None
            )

    def page(self) -> list[tuple[Any, int, tuple[int, ...], torch.dtype]]:
        """The states of a module's layers, as they lie in a page: layer, number, shape, dtype.

        The widest dtypes are first, and the page is filled up, so that each can be read in place.
        """
        found = [
            (layer, i, shape, dtype)
            for layer in self.together
            for i, (shape, dtype, _) in enumerate(layer.state)
        ]
        found.sort(key=lambda row: -row[3].itemsize)
        left = -sum(prod(shape) * dtype.itemsize for _, _, shape, dtype in found) % 64
        return found + ([(None, 0, (left,), torch.uint8)] if left else [])

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for _, _, shape, _ in self.page())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(dtype for _, _, _, dtype in self.page())

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """The page, of the first layer of a module; None of the others."""
        return super().get_kv_cache_spec(vllm_config) if self is self.together[0] else None

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Give each layer of the module its states: a place in each page.

        What the engine copies where a request goes on from a cached prefix is the page's bytes.
        """
        pages, at = kv_cache.squeeze(dim=(1, 2)), 0
        for layer in self.together:
            layer.states = [torch.tensor([])] * len(layer.state)
        for layer, i, shape, dtype in self.page():
            end = at + prod(shape) * dtype.itemsize
            if layer is not None:
                layer.states[i] = pages[:, at:end].view(dtype).view(-1, *shape)
            at = end
        self.kv_cache = (pages[:, :at],)

    def get_attn_backend(self) -> type[LinearAttentionBackend]:
        return RecurrentBackend

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def forward(self, xs: list[torch.Tensor], params: list[torch.Tensor]) -> list[torch.Tensor]:
        count = xs[0].shape[0]
        is_compiling = torch.compiler.is_compiling()
        metadata: Any = None if is_compiling else get_forward_context().attn_metadata
        if metadata is not None:
            batch = batch_of(metadata[self.together[0].prefix])
            if batch.num_decodes == count and self.fits(xs, params):
                self.begin(batch)
                return self.kernel.step(self.states, batch, xs, params)
        results = [xs[0].new_empty((count, *shape), dtype=d) for shape, d in self.results]
        if is_compiling:
            torch.ops.vllm.funcmodels_recurrent(xs, params, results, self.prefix)
        else:
            self.run(xs, params, results)
        return results

    def run(
        self, xs: list[torch.Tensor], params: list[torch.Tensor], results: list[torch.Tensor]
    ) -> None:
        metadata: Any = get_forward_context().attn_metadata
        if metadata is None:  # the engine measures its memory
            for result in results:
                result.zero_()
            return
        batch = batch_of(metadata[self.together[0].prefix])
        count = xs[0].shape[0]
        if batch.num_tokens < count:  # the engine fills some batches up
            for result in results:
                result[batch.num_tokens :].zero_()
        self.begin(batch)
        kernel = self.kernel if self.fits(xs, params) else None
        if n := batch.num_decodes:
            given, out = (ts if n == count else [t[:n] for t in ts] for ts in (xs, results))
            if kernel is not None:
                new = kernel.step(self.states, batch, given, params)
                for result, y in zip(out, new, strict=True):
                    result.copy_(y)
            else:
                self.run_step(batch.decodes, given, params, out)
        if not batch.prompts:
            return
        if kernel is not None:
            given, out = ([t[n : batch.num_tokens] for t in ts] for ts in (xs, results))
            kernel.prefill(self.states, batch, given, params, out)
        elif self.chunked is not None:
            for i, (first, last) in enumerate(batch.prompts):
                self.run_chunks(batch.places[n + i : n + i + 1], first, last, xs, params, results)
        else:
            self.run_tokens(batch, xs, params, results)

    def begin(self, batch: BatchedRequests) -> None:
        """Give requests that have only begun the declared state."""
        if batch.new:
            for cache, (_, _, init) in zip(self.states, self.state, strict=True):
                cache[batch.new] = init

    def fits(self, xs: list[torch.Tensor], params: list[torch.Tensor]) -> bool:
        """Whether the kernel takes such operands: their dtypes are always the same."""
        if self.kernel_fits is None:
            kernel = self.kernel
            self.kernel_fits = kernel is not None and kernel.fits(self.states, xs, params)
        return bool(self.kernel_fits)

    def run_step(
        self,
        places: torch.Tensor,
        xs: list[torch.Tensor],
        params: list[torch.Tensor],
        results: list[torch.Tensor],
    ) -> None:
        """One token of each of some requests."""
        new = self.step(*self.taken(places), *xs, *params)
        self.keep(places, new)
        for result, y in zip(results, new[len(self.state) :], strict=True):
            result.copy_(y)

    def run_chunks(
        self,
        place: torch.Tensor,
        first: int,
        last: int,
        xs: list[torch.Tensor],
        params: list[torch.Tensor],
        results: list[torch.Tensor],
    ) -> None:
        """The tokens of one request from `first` on, some at once."""
        assert self.chunked is not None
        count = len(self.state)
        state = [s[0] for s in self.taken(place)]
        for at in range(first, last, self.chunk):
            end = min(at + self.chunk, last)
            new = self.chunked(*state, *(x[at:end] for x in xs), *params)
            state = new[:count]
            for result, y in zip(results, new[count:], strict=True):
                result[at:end] = y
        self.keep(place, [s[None] for s in state])

    def run_tokens(
        self,
        batch: BatchedRequests,
        xs: list[torch.Tensor],
        params: list[torch.Tensor],
        results: list[torch.Tensor],
    ) -> None:
        """The tokens of some requests, one of each at a time; those that end first leave."""
        count = len(self.state)
        order = sorted(
            range(len(batch.prompts)), key=lambda i: batch.prompts[i][0] - batch.prompts[i][1]
        )
        lengths = [batch.prompts[i][1] - batch.prompts[i][0] for i in order]
        at = batch.places.new_tensor([batch.prompts[i][0] for i in order])
        places = batch.places[batch.num_decodes :][order]
        state = self.taken(places)
        for t in range(lengths[0]):
            new = self.step(*state, *(x[at] for x in xs), *params)
            state = list(new[:count])
            for result, y in zip(results, new[count:], strict=True):
                result[at] = y
            at = at + 1
            going = sum(length > t + 1 for length in lengths)
            if going < len(at):
                self.keep(places[going:], [s[going:] for s in state])
                at, places, state = at[:going], places[:going], [s[:going] for s in state]

    def taken(self, places: torch.Tensor) -> list[torch.Tensor]:
        """The states of some requests."""
        return [cache[places] for cache in self.states]

    def keep(self, places: torch.Tensor, states: Iterable[torch.Tensor]) -> None:
        for cache, state in zip(self.states, states, strict=False):
            cache[places] = state


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


def batch_of(metadata: Any) -> BatchedRequests:
    """That of the engine's metadata, which all layers of a kind are given."""
    found = getattr(metadata, "batched_requests", None)
    if found is None or found.source is not metadata.state_indices_tensor:
        found = metadata.batched_requests = BatchedRequests(metadata)
    return found


def run_recurrent(
    xs: list[torch.Tensor],
    params: list[torch.Tensor],
    results: list[torch.Tensor],
    layer_name: str,
) -> None:
    """Let a layer write its results: one operation, of which the engine's compiler sees no more."""
    get_forward_context().no_compile_layers[layer_name].run(xs, params, results)


def largest_state(kinds: list) -> tuple:
    """The shapes and dtypes that need the most bytes."""
    return max(
        kinds, key=lambda kind: sum(prod(s) * d.itemsize for s, d in zip(*kind, strict=True))
    )
