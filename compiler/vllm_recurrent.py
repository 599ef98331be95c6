"""Recurrences in the engine, for emitted files to carry along: functions are copied as they stand.

They may use the names that the file imports, and of this package what is carried along too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from compiler.vllm_recurrent_batch import BatchedRequests, batch_of


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
