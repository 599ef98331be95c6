"""Layers that an emitted class has beside vLLM's, and what they are made with.

Copied into emitted files as it stands here; it may use the names that the file imports, and what
else is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.platforms import current_platform


class LatentAttention(nn.Module):
    """Attention to keys and values that a linear makes of a latent.

    The latent is cached where the engine says that it does so: by the model_type of config.json,
    unless VLLM_MLA_DISABLE=1. Elsewhere keys and values are, padded to one width.
    """

    def __init__(
        self,
        kv_b_proj: ColumnParallelLinear,
        num_heads: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        kv_lora_rank: int,
        scale: float,
        vllm_config: VllmConfig,
        prefix: str,
    ) -> None:
        super().__init__()
        self.kv_b_proj = kv_b_proj
        self.num_heads = num_heads
        self.v_head_dim = v_head_dim
        self.width = max(qk_nope_head_dim + qk_rope_head_dim, v_head_dim)
        self.caches_latent = vllm_config.model_config.use_mla
        cache = {
            "cache_config": vllm_config.cache_config,
            "quant_config": vllm_config.quant_config,
            "prefix": prefix,
        }
        if not self.caches_latent:
            self.attn = Attention(num_heads, self.width, scale, **cache)
            return
        self.attn = MLAAttention(
            num_heads=num_heads,
            scale=scale,
            qk_nope_head_dim=qk_nope_head_dim,
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=v_head_dim,
            q_lora_rank=None,
            kv_lora_rank=kv_lora_rank,
            kv_b_proj=kv_b_proj,
            **cache,
        )
        cached, sizes = self.attn.head_size, self.attn.attn_backend.get_supported_head_sizes()
        if sizes and cached not in sizes:  # the engine does not ask on a CPU, and fails later
            raise ValueError(
                f"{self.attn.attn_backend.get_name()} caches no latents of this size\n"
                f"  got:  kv_lora_rank + qk_rope_head_dim = {cached}\n"
                f"  need: one of {', '.join(map(str, sizes))}\n"
                "  fix:  VLLM_MLA_DISABLE=1 in the environment: keys and values are cached instead"
            )

    def forward(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
    ) -> torch.Tensor:
        q = torch.cat((q_nope, q_rope), dim=-1)
        if self.caches_latent:
            shape = torch.Size((q.shape[0], self.num_heads * self.v_head_dim))
            return self.attn(q, latent, k_rope, output_shape=shape)
        kv, _ = self.kv_b_proj(latent)
        k_nope, v = kv.unflatten(-1, (self.num_heads, -1)).tensor_split([q_nope.shape[-1]], -1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.num_heads, -1)), dim=-1)
        q, k, v = (F.pad(x, (0, self.width - x.shape[-1])).flatten(1) for x in (q, k, v))
        out = self.attn(q, k, v).unflatten(-1, (self.num_heads, -1))
        return out[..., : self.v_head_dim].flatten(1)


class TypedRMSNorm(nn.Module):
    """Root-mean-square norm whose weight has another dtype than what it scales."""

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        offset: float = 0.0,
        rounds_once: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype), requires_grad=False)
        self.settings = {"eps": eps, "offset": offset, "rounds_once": rounds_once}

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        total = x if residual is None else x + residual
        out = normed(total, self.weight, **self.settings)
        return out if residual is None else (out, total)


class TypedLayerNorm(nn.LayerNorm):
    """Layer norm whose weight has another dtype than what it scales."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class OwnRoutedExperts(RoutedExperts):
    """vLLM's experts; on a CPU they can be loaded again, and a bias after them is added once.

    Its name holds that of vLLM's class, by which compressed-tensors finds what it quantises.
    """

    def _get_quant_method(self, prefix: str, quant_config, moe_config):
        if quant_config is None:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        try:
            method = super()._get_quant_method(prefix, quant_config, moe_config)
            if getattr(method, "experts_cls", RoutedExperts) is None:  # told only after loading
                raise NotImplementedError(f"{type(method).__name__} found none")
            return method
        except (NotImplementedError, ValueError) as error:
            raise ValueError(
                "vLLM has no kernel here for the quantised experts of this checkpoint\n"
                f"  got:  {quant_config.get_name()}, for {prefix}: {error}\n"
                "  need: experts that are not quantised, or another device\n"
                "  fix:  quantise the checkpoint with its experts in the list of those to ignore"
            ) from error

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]):
        if current_platform.is_cpu():  # a kernel that was made would not be given packed weights
            self.quant_method.moe_kernel = None
        return super().load_weights(map(self.own, weights))

    def own(self, tensor: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
        """A tensor; of the biases that are not divided over the ranks, the first has the one."""
        name, weight = tensor
        if name.endswith(f".{self.ckpt_down_proj_name}.bias") and self.moe_config.tp_rank > 0:
            weight = torch.zeros_like(weight)
        return name, weight

    def _load_w13(
        self, expert_data, shard_dim, shard_id, loaded_weight, tp_rank, load_full=False
    ) -> None:
        """Gates, then ups; for one activation they take turns."""
        if self.activation.value != "swigluoai":
            args = expert_data, shard_dim, shard_id, loaded_weight, tp_rank, load_full
            super()._load_w13(*args)
            return
        ranks = 1 if load_full else self.moe_config.tp_size
        own = loaded_weight.chunk(ranks, shard_dim)[0 if load_full else tp_rank]
        turns = expert_data.unflatten(shard_dim, (-1, 2))
        turns.select(shard_dim + 1, 0 if shard_id == "w1" else 1).copy_(own)


def packed_routing(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Weights and ids of experts in one tensor: vLLM hands its layer one, for logits."""
    return torch.cat((weights.float(), ids.float()), dim=-1)


def unpacked_routing(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The routing that the model computed, for the layer that asks for one."""
    weights, ids = gating_output.split(topk, dim=-1)
    return weights, ids.to(torch.int32)


def associative_scan(combine: Callable, xs: list[torch.Tensor], dim: int) -> list[torch.Tensor]:
    """y_t = combine(y_{t-1}, x_t) along a dim: pairs are combined, their results scanned."""
    n = xs[0].shape[dim]
    if n < 2:
        return xs
    places = [torch.arange(start, n, 2, device=xs[0].device) for start in (0, 1)]
    even, odd = ([x.index_select(dim, at) for x in xs] for at in places)
    pairs = combine(*(x.narrow(dim, 0, n // 2) for x in even), *odd)
    pairs = associative_scan(combine, list(pairs), dim)  # results at odd places
    if count := (n - 1) // 2:  # at even places after the first: the odd ones before are combined
        rest = [x.narrow(dim, 1, count) for x in even]
        rest = combine(*(y.narrow(dim, 0, count) for y in pairs), *rest)
        even = [torch.cat([x.narrow(dim, 0, 1), r], dim) for x, r in zip(even, rest, strict=True)]
    order = torch.cat(places).argsort()
    return [torch.cat(ys, dim).index_select(dim, order) for ys in zip(even, pairs, strict=True)]


def numbered(prefix: str, vllm_config: VllmConfig) -> str:
    """A name for an attention layer with one number in it: the engine sorts caches by that."""
    parts = prefix.split(".")
    if sum(part.isdigit() for part in parts) == 1:
        return prefix
    made = len(vllm_config.compilation_config.static_forward_context)
    return ".".join([*(f"_{p}" if p.isdigit() else p for p in parts), str(1000 + made)])


def normed(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    offset: float,
    rounds_once: bool = False,
) -> torch.Tensor:
    """Root-mean-square norm with a weight that is computed, not a parameter."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if offset or rounds_once:
        return (h * (offset + weight.float())).to(x.dtype)
    return (h.to(x.dtype) * weight).to(x.dtype)
