"""What emitted model files carry along: functions are copied into them as they stand here.

They may use the names that the file imports, and nothing of this package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import product

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from vllm import _custom_ops
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors


def kernels_round(dtype: torch.dtype) -> bool:
    """Whether vLLM's CPU kernels round to a dtype; without AVX512-BF16 they cut bfloat16 off."""
    return dtype != torch.bfloat16 or torch.cpu._is_avx512_bf16_supported()


def normed_wide(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float):
    """Root-mean-square normalisation by vLLM's kernel in float32, rounded once by torch."""
    wide = x.float() if residual is None else x.float() + residual
    # The kernel reads a tensor's rows one after another, and writes no strides.
    wide = wide.contiguous()
    out = torch.empty_like(wide)
    _custom_ops.rms_norm(out, wide, weight, eps)
    y = out.to(x.dtype)
    return y if residual is None else (y, wide.to(x.dtype))


class FastRMSNorm(RMSNorm):
    """vLLM's RMSNorm; run eagerly on a CPU, by vLLM's kernel and not by ten operations."""

    def forward_cpu(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        if not kernels_round(x.dtype):
            return normed_wide(x, residual, self.weight.float(), self.variance_epsilon)
        if residual is None:
            # The kernel reads a tensor's rows one after another, and writes no strides.
            x = x.contiguous()
            out = torch.empty_like(x)
            _custom_ops.rms_norm(out, x, self.weight, self.variance_epsilon)
            return out
        if not (x.is_contiguous() and residual.is_contiguous()):
            return self.forward_native(x, residual)
        _custom_ops.fused_add_rms_norm(x, residual, self.weight, self.variance_epsilon)
        return x, residual


class FastGemmaRMSNorm(GemmaRMSNorm):
    """vLLM's GemmaRMSNorm; run eagerly on a CPU, by vLLM's kernel, in float32 as it is there."""

    def forward_cpu(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        if x.dtype == torch.float32:  # vLLM's own bits: int8 after a norm shows the last of them
            return self.forward_native(x, residual)
        return normed_wide(x, residual, self.weight.float() + 1.0, self.variance_epsilon)


class FastSiluAndMul(SiluAndMul):
    """vLLM's SiluAndMul; run eagerly on a CPU, it makes one new tensor and not two."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class FastGeluAndMul(GeluAndMul):
    """vLLM's GeluAndMul; run eagerly on a CPU, it makes one new tensor and not two."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate=self.approximate).mul_(up)

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        if self.approximate == "tanh":
            return gelu_tanh(gate) * up
        return F.gelu(gate, approximate=self.approximate) * up


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """F.gelu(x, approximate="tanh"); compiled, with an exponential, in half the time on a CPU.

    0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)): the sum of tanh loses digits where x is negative.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    minus_2u = wide * (-1.5957691216057308 - 0.07135481627260025 * wide * wide)
    return (wide / (1.0 + torch.exp(minus_2u))).to(x.dtype)


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


class AdaptersApart:
    """Requests without an adapter get none.

    For them, vLLM's kernels for CPUs read slot -1, the last adapter: here, an empty one.
    """

    @property
    def lora_manager(self):
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager) -> None:  # given here once the layers hold slots
        self._lora_manager = manager
        for module in manager.modules.values() if current_platform.is_cpu() else ():
            for name in ("lora_a_stacked", "lora_b_stacked"):
                slots = getattr(module, name)
                several = isinstance(slots, tuple)
                parts = slots if several else (slots,)
                longer = tuple(torch.cat([s, torch.zeros_like(s[:1])]) for s in parts)
                setattr(module, name, longer if several else longer[0])
            if hasattr(module, "lora_a_stacked_2d"):
                module.lora_a_stacked_2d = module.lora_a_stacked.flatten(0, 1)


class ModuleNames(WeightsMapper):
    """Names of modules in the checkpoint -> here: adapters and quantisation name modules.

    An adapter for anything but `lora_targets` is refused: vLLM would serve without it.
    """

    def __init__(
        self,
        renamed: dict,
        lora_targets: dict,
        split: dict,
        repeated: dict,
    ) -> None:
        super().__init__()
        self.renamed = renamed
        self.lora_targets = lora_targets
        self.split = split
        self.repeated = repeated

    def map_name(self, key: str) -> str:
        module, of_adapter, _ = key.partition(".lora_")
        if of_adapter and module not in (targets := spelled_out(self.lora_targets)):
            raise ValueError(
                f"this model has no {module} that an adapter could change\n"
                f"  need: {', '.join(targets[:5])}, or another of {len(targets)} in all\n"
                f"  fix:  {self.fix(module)}"
            )
        matches = [(pattern.match(key), new) for pattern, new in self.renamed.items()]
        found = [(match.end(), [match.expand(n) for n in new]) for match, new in matches if match]
        end, renamed = max(found, default=(0, [""]))
        names = [name + key[end:] for name in renamed]
        # One that is several layers here: compressed-tensors takes a pattern for a name.
        return names[0] if len(names) == 1 else f"re:({'|'.join(map(re.escape, names))})$"

    def fix(self, module: str) -> str:
        """What to do about an adapter for a module that is no target."""
        parts, uses = (
            tensors.get(module) or tensors.get(f"{module}.weight")
            for tensors in (self.split, self.repeated)
        )
        if uses:
            return (
                "merge the adapter into the weights: the model uses this module in "
                f"{len(uses)} places, and an adapter would change one"
            )
        if parts:
            return f"name what is stacked in this module: {', '.join(parts)}"
        return "name modules in the adapter as the model's checkpoint does"


class CheckpointNames(WeightsMapper):
    """Names of tensors in the checkpoint -> of parameters here.

    The tensors of a quantised module are named as the module is, and end otherwise.
    """

    def __init__(
        self,
        lora_targets: dict,
        split: dict | None = None,
        repeated: dict | None = None,
        **names,
    ) -> None:
        renamed, ends = {}, {}
        tensors = names.get("orig_to_new_regex", {})
        for pattern, new in sorted(tensors.items(), key=lambda t: t[0].pattern.endswith("bias$")):
            if new is not None:
                module = re.sub(r"(\\\.(weight|bias))?\$$", "", pattern.pattern)
                other = "" if pattern.pattern == f"{module}$" else r"(?!(weight|bias)$)"
                new = re.sub(r"\.(weight|bias)$", "", new)
                # Also as a whole, of which each of several in one tensor is a numbered part.
                whole = re.sub(r"\\#\d+", "", module), re.sub(r"#\d+", "", new)
                for old, own in ((module, new), whole):
                    found = renamed.setdefault(re.compile(rf"{old}(?=\.|$)"), [])
                    if own not in found and not (found and pattern.pattern.endswith("bias$")):
                        found.append(own)
                    ends[re.compile(rf"{old}(?=\.{other})")] = found
        quantised = {pattern: new[0] for pattern, new in ends.items() if len(new) == 1}
        super().__init__(**{**names, "orig_to_new_regex": {**tensors, **quantised}})
        self.modules = ModuleNames(renamed, lora_targets, split or {}, repeated or {})

    def get_rename_mapper(self) -> ModuleNames:
        return self.modules


class Carried:
    """A value that pipeline stages send on: its name, and the stages that receive it.

    Args:
        to: the layers with which such a stage may begin.
        sizes: beside the number of tokens.
        dtype: None for the engine's own.
        cut: the dim that is cut over the ranks, and the number of its parts.
    """

    def __init__(
        self,
        name: str,
        to: range,
        *sizes: int,
        dtype: torch.dtype | None = None,
        cut: tuple[int, int] | None = None,
    ) -> None:
        self.name, self.to, self.dtype = name, to, dtype
        self.sizes, self.dim = list(sizes), None
        ranks = get_tensor_model_parallel_world_size()
        if cut is not None:  # ranks beyond the number of parts have some part again
            self.dim, parts = cut
            self.sizes[self.dim - 1] = sizes[self.dim - 1] // parts * max(parts, ranks)


class Stage:
    """The layers of a pipeline stage, and what it receives and sends.

    Between stages the engine sends a part of each tensor from each rank, and joins them: as if all
    ranks had the same. So what is cut over the ranks is joined before, and cut again.
    """

    def __init__(self, start_layer: int, end_layer: int, *values: Carried) -> None:
        self.layers = range(start_layer, end_layer)
        self.received_values = {v.name: v for v in values if start_layer in v.to}
        self.sent_values = {v.name: v for v in values if end_layer in v.to}

    def received(self, tensors: IntermediateTensors) -> dict[str, torch.Tensor]:
        """What this stage receives, by name."""
        found = {}
        for name, value in self.received_values.items():
            x = tensors.tensors[name]
            if value.dim is not None:
                width = x.shape[value.dim] // get_tensor_model_parallel_world_size()
                x = x.narrow(value.dim, get_tensor_model_parallel_rank() * width, width)
            found[name] = x
        return found

    def sent(self, **values: torch.Tensor | None) -> IntermediateTensors:
        """Of all values those that the next stage receives."""
        found = {}
        for name, value in self.sent_values.items():
            x = values[name]
            assert x is not None, f"{name} is sent before it is made"
            x = x.contiguous()
            found[name] = x if value.dim is None else tensor_model_parallel_all_gather(x, value.dim)
        return IntermediateTensors(found)

    def make_empty(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Room for what this stage receives."""
        return IntermediateTensors(
            {
                name: torch.zeros((batch_size, *v.sizes), dtype=v.dtype or dtype, device=device)
                for name, v in self.received_values.items()
            }
        )


def check_config(vllm_config: VllmConfig, compiled_for: dict) -> None:
    """Refuse a folder whose config.json is not the one this file was compiled for."""
    config = vllm_config.model_config.hf_text_config  # of a model of text and images, its own part
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" not in compiled_for.get("rope_parameters", {}):
        rope = rope.get("full_attention") or rope  # one for each type of layer, spelled as one
    wrong = []
    for name, want in compiled_for.items():
        got = getattr(config, name, None)
        if name == "rope_theta" and rope:
            got = rope.get(name)
        if name == "rope_parameters":  # the base stands for itself, and may stand elsewhere
            got = {k: rope.get(k, v) for k, v in want.items()}
            got["rope_type"] = rope.get("rope_type", "default")
        if name == "tie_word_embeddings":  # vLLM unties where the checkpoint has both tensors
            got = got or vllm_config.model_config.word_embeddings_untied_by_checkpoint
        if got is not None and got != want:
            wrong.append(f"{name}={got}, compiled for {want}")
    if wrong:
        raise ValueError(
            "this model class was compiled for another config.json\n"
            f"  got:  {'; '.join(wrong)}\n"
            "  fix:  compile the model of this folder, and register that class"
        )


def check_generates(vllm_config: VllmConfig) -> None:
    """Refuse to be run for embeddings: vLLM would take hidden states that nobody declared."""
    if vllm_config.model_config.runner_type == "pooling":
        raise ValueError(
            "this model was compiled to generate tokens\n"
            "  got:  runner='pooling'\n"
            "  fix:  fm.Model(..., task='embed', pooling=...), whose forward returns hidden states"
        )


def check_pools(vllm_config: VllmConfig, pooling: str, attention: str) -> None:
    """Refuse an engine that would pool, or cut prompts, otherwise than this model was declared."""
    config = vllm_config.model_config
    pooler, wrong = config.pooler_config, None
    if config.runner_type != "pooling" or pooler is None:
        wrong = f"runner={config.runner_type!r}, need 'pooling'"
    elif pooler.seq_pooling_type != pooling:
        wrong = f"seq_pooling_type={pooler.seq_pooling_type!r}, compiled for {pooling!r}"
    elif attention == "encoder_only" != config.attn_type:
        wrong = f"attn_type={config.attn_type!r}, compiled for {attention!r}"
    if wrong:
        raise ValueError(
            "this model class was compiled for another way of pooling\n"
            f"  got:  {wrong}\n"
            "  fix:  LLM(folder, runner='pooling'), of a model that fm.register was given, "
            "without a pooler_config of its own"
        )


def spelled_out(table: dict) -> list[str]:
    """The names of a table, with the stars filled in."""
    filled = [(name.replace("*", "{}"), product(*indices)) for name, indices in table.items()]
    return [name.format(*index) for name, indices in filled for index in indices]


def tensors_to_await(vllm_config: VllmConfig, tensors: dict) -> set[str]:
    """What the first loading must bring: vLLM leaves a linear that misses its tensor as allocated.

    Later loadings may bring a part. Of a quantised checkpoint the modules are awaited, since its
    tensors have other names; where loading begins with random weights, nothing is.
    """
    if vllm_config.load_config.load_format == "dummy":
        return set()
    names = spelled_out(tensors)
    if vllm_config.quant_config is not None:
        names = [name.removesuffix(".weight").removesuffix(".bias") for name in names]
    return set(names)


def note_tensors(weights: Iterable[tuple[str, torch.Tensor]], awaited: set[str]):
    """The same weights; each is awaited no more."""
    for name, weight in weights:
        awaited.difference_update((name, name.rpartition(".")[0]))
        yield name, weight


def read_tensors(weights: Iterable[tuple[str, torch.Tensor | str]]):
    """The same weights; of those that another process sends, the files are named and read here."""
    opened = {}
    for name, weight in weights:
        if isinstance(weight, str):
            if weight not in opened:
                opened = {weight: safe_open(weight, framework="pt")}
            weight = opened[weight].get_tensor(name)
        yield name, weight


def with_prefix(weights: Iterable[tuple[str, torch.Tensor]], prefix: str, firsts: tuple):
    """The same weights; names that begin with one of `firsts` have the prefix before them."""
    for name, weight in weights:
        yield (prefix + name if name.partition(".")[0] in firsts else name), weight


def without_prefix(weights: Iterable[tuple[str, torch.Tensor]], prefix: str):
    """The same weights; names that begin with the prefix have it no more."""
    for name, weight in weights:
        yield name.removeprefix(prefix), weight


def set_apart(
    weights: Iterable[tuple[str, torch.Tensor]], shared: dict, awaited: set[str]
) -> Iterable[tuple[str, torch.Tensor]]:
    """The same weights; a tensor that holds several, in one turn or in many, as those.

    So are the tensors of a quantised module that have a row for each of its own, such as scales.
    All of one that is a layer here, with each of the several in one piece, go on as they are:
    vLLM's layers divide them.
    """

    def find(name: str):
        tables = ((pattern.fullmatch(name), *table) for pattern, table in shared.items())
        return next((table for table in tables if table[0]), None)

    for name, weight in weights:
        module, _, kind = name.rpartition(".")
        whole = find(name)
        found = whole or find(f"{module}.weight")
        if found is None:
            yield name, weight
            continue
        match, dim, turns, unit, is_one, parts = found
        if whole is None and is_one and turns == 1:
            awaited.difference_update(match.expand(part).rpartition(".")[0] for part in parts)
            yield name, weight
            continue
        if whole is None and (dim or weight.shape[:1] != (turns * sum(parts.values()) * unit,)):
            how = "in turns" if turns > 1 else "of several layers"
            raise ValueError(
                f"{name} cannot be loaded: {module}.weight holds several matrices {how}\n"
                "  need: a checkpoint in which this module is not quantised, or by its rows\n"
                "  fix:  quantise it with this module in the list of those to ignore"
            )
        rows = weight.unflatten(dim, (turns, sum(parts.values()), unit))
        for part, own in zip(parts, rows.split(list(parts.values()), dim + 1), strict=True):
            own_name = match.expand(part)
            if whole is None:
                own_name = f"{own_name.rpartition('.')[0]}.{kind}"
            yield own_name, own.flatten(dim, dim + 2)


def take_apart(weights: Iterable[tuple[str, torch.Tensor]], split: dict, repeated: dict):
    """The same weights; some in parts, as those stacked over layers, some once for each use."""
    for name, weight in weights:
        if name in split:
            yield from take_apart(zip(split[name], weight, strict=True), split, repeated)
        else:
            yield from ((copy, weight) for copy in repeated.get(name, [name]))


def each_expert(weights: Iterable[tuple[str, torch.Tensor]], experts: dict):
    """The same weights; a tensor that holds all experts as one for each, which is how they load."""
    for name, weight in weights:
        for pattern, new in experts.items():
            if match := pattern.fullmatch(name):
                name = match.expand(new)
                yield from ((name.format(e), part) for e, part in enumerate(weight))
                break
        else:
            yield name, weight


def drop_tied(weights: Iterable[tuple[str, torch.Tensor]], tied: dict):
    """The same weights without those stored a second time, which must be equal to the first."""
    held = {}
    for name, weight in weights:
        own = tied.get(name, name)
        if own in tied.values() and not torch.equal(held.setdefault(own, weight), weight):
            raise ValueError(
                f"{name} is not the tensor that it is tied to\n"
                '  fix:  "tie_word_embeddings": false in config.json, and compile again'
            )
        if name not in tied:
            yield name, weight


def add_head(weights: Iterable[tuple[str, torch.Tensor]], table: str, head: nn.Module):
    """The same weights; in an update, when vLLM takes apart what is tied, the head's own too.

    On a CPU the head has packed a copy of the table, which would stay the old one.
    """
    is_apart = isinstance(getattr(head, "weight", None), torch.Tensor) and head.weight.is_meta
    for name, weight in weights:
        yield name, weight
        if name == table and is_apart:
            yield "tied_head.weight", weight


def check_loaded(awaited: set[str]) -> None:
    """Refuse to serve a model of which a tensor is missing."""
    if awaited:
        missing = sorted(awaited)
        more = f", and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors of this model\n"
            f"  missing: {', '.join(missing[:5])}{more}\n"
            "  fix:     serve the folder that this class was compiled for, or save it again"
        )


def check_registered(cls: type, vllm_config: VllmConfig) -> None:
    """Refuse to be built in the place of a class registered later under the same name.

    vLLM remembers the class of a path and a name: the old one would be served silently.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    name = vllm_config.model_config.architecture
    latest = ModelRegistry.models[name].load_model_cls() if name in ModelRegistry.models else cls
    if hasattr(latest, "compiled_by") and latest is not cls:
        raise ValueError(
            f"{name} was registered again after this process had loaded it, "
            "and vLLM kept the first class\n"
            "  fix:  register the new class under a new name, with "
            'hf_overrides={"architectures": ["NewName"]}, or start a new process'
        )


def check_ranks(*axes: tuple[str, int, bool]) -> None:
    """Refuse a tensor-parallel size that the model's axes do not allow."""
    ranks = get_tensor_model_parallel_world_size()
    for axis, size, exact in axes:
        if size % ranks and (exact or ranks % size):
            how = "divides it" if exact else "divides it, or is a multiple of it"
            raise ValueError(
                f"cannot split axis {axis!r} over mesh axis 'tp'\n"
                f"  got:  {axis}={size}, tp={ranks}\n"
                f"  need: a tensor_parallel_size that {how}"
            )


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


def check_experts(vllm_config: VllmConfig, hidden: int, mlp: int, *, is_summed: bool) -> None:
    """Refuse experts that vLLM's kernels would compute wrongly, or crash on.

    Args:
        mlp: the size that must divide, of one expert; 0 where it is padded.
        is_summed: whether the layer itself takes the sum over the ranks.
    """
    parallel = vllm_config.parallel_config
    if parallel.enable_expert_parallel:
        if current_platform.is_cpu():
            raise ValueError(
                "vLLM's experts crash on a CPU when they are divided over the ranks\n"
                "  got:  enable_expert_parallel=True\n"
                "  fix:  enable_expert_parallel=False: each rank has a part of every expert"
            )
        if parallel.data_parallel_size > 1 and not is_summed:
            raise ValueError(
                "this model sums its experts with another layer before it does so over the ranks\n"
                f"  got:  enable_expert_parallel=True, "
                f"data_parallel_size={parallel.data_parallel_size}\n"
                "  fix:  data_parallel_size=1"
            )
    if current_platform.is_cpu() and vllm_config.lora_config is not None:
        raise ValueError(
            "vLLM has no kernel for experts beside LoRA adapters on a CPU\n"
            "  got:  enable_lora=True\n"
            "  fix:  merge the adapter into the weights, or another device"
        )
    local = mlp // get_tensor_model_parallel_world_size()
    if current_platform.is_cpu() and (hidden % 32 or local % 32):
        raise ValueError(
            "vLLM's experts on a CPU need sizes that 32 divides\n"
            f"  got:  hidden {hidden}"
            + (f", {local} of an expert on each rank\n" if mlp else "\n")
            + "  fix:  a model of such sizes, or another device"
        )


def check_full_attention(vllm_config: VllmConfig) -> None:
    """Refuse a sliding window of config.json over a model that attends to all tokens."""
    window = vllm_config.cache_config.sliding_window
    if window is not None:
        raise ValueError(
            f"config.json sets sliding_window={window}, "
            "but this model attends to all tokens\n"
            "  fix:  set sliding_window to null in config.json, "
            "or pass window= to ops.attention"
        )


def check_dtype(vllm_config: VllmConfig, dtype: torch.dtype) -> None:
    """Refuse another dtype than that of the values which attention is given."""
    served = vllm_config.model_config.dtype
    if served != dtype:
        raise ValueError(
            f"this model attends to values of {dtype}, and the engine caches them in its own\n"
            f"  got:  dtype={served}\n"
            f"  fix:  dtype={str(dtype).removeprefix('torch.')!r}, or cast q, k and v back before "
            "ops.rope and ops.attention"
        )


def check_embeds(vllm_config: VllmConfig, dtype: torch.dtype) -> None:
    """Refuse prompts as embeddings where the engine would round them to its own dtype."""
    served = vllm_config.model_config.dtype
    if vllm_config.model_config.enable_prompt_embeds and served != dtype:
        raise ValueError(
            f"this model embeds tokens in {dtype}, and the engine hands others over in its own\n"
            f"  got:  dtype={served}, enable_prompt_embeds=True\n"
            f"  fix:  dtype={str(dtype).removeprefix('torch.')!r}, or enable_prompt_embeds=False"
        )


def check_tokens_given(vllm_config: VllmConfig) -> None:
    """Refuse prompts as embeddings for a model that reads the tokens themselves."""
    if vllm_config.model_config.enable_prompt_embeds:
        raise ValueError(
            "this model reads the tokens in other ways than one embedding\n"
            "  got:  enable_prompt_embeds=True: prompts that may have no tokens\n"
            "  fix:  enable_prompt_embeds=False, and prompts as token ids"
        )


def check_keys_cached(vllm_config: VllmConfig) -> None:
    """Refuse an engine that caches latents for a model that makes keys and values itself."""
    if vllm_config.model_config.use_mla:
        raise ValueError(
            "by config.json the engine caches latents, "
            "but this model attends to keys and values\n"
            "  fix:  VLLM_MLA_DISABLE=1 in the environment, or use ops.latent_attention"
        )


def check_one_stage(vllm_config: VllmConfig, why: str) -> None:
    """Refuse pipeline stages for a model that cannot be cut into them."""
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ValueError(
            f"this model cannot be cut into {stages} pipeline stages: {why}\n"
            "  fix:  pipeline_parallel_size=1, with more tensor_parallel_size instead; or one list "
            "of layers,\n        each called with what the one before returned, and positions"
        )


def check_length(vllm_config: VllmConfig, limit: int, rope_type: str) -> None:
    """Refuse lengths at which this rope turns cached keys otherwise than new ones."""
    length = vllm_config.model_config.max_model_len
    if length > limit:
        raise ValueError(
            f"rope type {rope_type!r} depends on the length of the whole sequence "
            f"above {limit} tokens, which a KV cache cannot follow\n"
            f"  got:  max_model_len={length}\n"
            f"  fix:  max_model_len={limit}"
        )


def check_positions(vllm_config: VllmConfig, limit: int) -> None:
    """Refuse lengths past the end of the table of angles: it would be read there all the same."""
    length = vllm_config.model_config.max_model_len
    if length > limit:
        raise ValueError(
            f"the rope of this model has angles for {limit} positions\n"
            f"  got:  max_model_len={length}\n"
            f"  fix:  max_model_len={limit}"
        )


def warn_length(vllm_config: VllmConfig, limit: int, rope_type: str) -> None:
    """Say where this rope differs: the engine fixes one set of factors for all."""
    if vllm_config.model_config.max_model_len > limit:
        init_logger(__name__).warning(
            "rope type %r: with max_model_len above %d the engine uses the factors for "
            "long sequences for all requests, short too; max_model_len=%d is exact",
            rope_type,
            limit,
            limit,
        )


def warn_int8(model: nn.Module) -> None:
    """Say where products of int8 are wrong: without VNNI, their sums are cut off at 16 bits."""
    scheme = {name: getattr(module, "scheme", None) for name, module in model.named_modules()}
    kernel = {name: getattr(found, "kernel", None) for name, found in scheme.items()}
    layers = [n for n, k in kernel.items() if isinstance(k, CPUInt8ScaledMMLinearKernel)]
    has = torch.cpu.get_capabilities()
    vnni = has.get("avx512_vnni", False) or has.get("avx_vnni", False)
    if layers and has["architecture"] == "x86_64" and not vnni:
        init_logger(__name__).warning_once(
            "int8 on a processor without VNNI: vLLM's kernel cuts sums of products off at 16 bits, "
            "in its own classes too, and results are wrong\n"
            "  got:  %d layers, as %s\n"
            "  need: avx512_vnni or avx_vnni among the flags of /proc/cpuinfo\n"
            "  fix:  serve on such a processor, or a checkpoint in float8",
            len(layers),
            layers[0],
        )


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


def name_ignored(vllm_config: VllmConfig, names: WeightsMapper, tensors: dict) -> None:
    """Leave out of a quantisation what the checkpoint does, under the names that it has here.

    vLLM takes a name without a dot of compressed-tensors' `ignore` for a class, and renames neither
    that nor a pattern: the layer would be made for quantised weights, and be given others, without
    an error.
    """
    ignored = getattr(vllm_config.quant_config, "ignore", None)
    if isinstance(ignored, list):
        patterns = [re.compile(name[3:]) for name in ignored if name.startswith("re:")]
        there = {re.sub(r"(#\d+)?(\.\w+)?$", "", name) for name in spelled_out(tensors)}
        found = [name for name in there if any(p.match(name) for p in patterns)]
        found += [name for name in ignored if "." not in name and not name.startswith("re:")]
        here = [names.get_rename_mapper().map_name(name) for name in sorted(found)]
        ignored += [name for name in here if name is not None and name not in ignored]


def made_in_time(vllm_config: VllmConfig, make_empty: Callable) -> Callable:
    """The same; on a CPU, an eager engine is made to call it before the first request.

    What a later stage receives goes to tensors made when the engine warms up. Eagerly, on a CPU, it
    leaves that out: it is told that it compiles until it has warmed up.
    """
    config = vllm_config.compilation_config
    eager_on_cpu = config.mode == CompilationMode.NONE and current_platform.is_cpu()
    if get_pp_group().is_first_rank or not eager_on_cpu:
        return make_empty
    config.mode = CompilationMode.STOCK_TORCH_COMPILE

    def make(batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        config.mode = CompilationMode.NONE
        return make_empty(batch_size, dtype, device)

    return make


def empty_of(dtypes: dict, hidden_size: int) -> Callable:
    """What makes the tensors that a stage receives, by name; None is the engine's own dtype."""

    def make(batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        return IntermediateTensors(
            {
                name: torch.zeros((batch_size, hidden_size), dtype=own or dtype, device=device)
                for name, own in dtypes.items()
            }
        )

    return make


def own_block(x: torch.Tensor, *, dim: int, units: int) -> torch.Tensor:
    """This rank's block of a value that every rank has whole."""
    ranks = get_tensor_model_parallel_world_size()
    rank = get_tensor_model_parallel_rank()
    parts = min(ranks, units)
    width = x.shape[dim] // parts
    return x.narrow(dim, rank * parts // ranks * width, width)


def own_block_loader(dim: int, units: int):
    """Loads a rank's block of a parameter, of which several ranks hold one if there are fewer."""

    def load(param: torch.Tensor, weight: torch.Tensor) -> None:
        param.data.copy_(own_block(weight, dim=dim, units=units))

    return load


def computed_loader(
    compute: Callable, dtype: torch.dtype, *, dim: int | None = None, units: int = 1
) -> Callable:
    """Loads what is computed of a parameter, element by element, or of a rank's block of it.

    One copy, of as many elements as are kept: the engine counts them to know when all is loaded.
    """

    def load(param: torch.Tensor, weight: torch.Tensor) -> None:
        own = weight if dim is None else own_block(weight, dim=dim, units=units)
        param.data.copy_(compute(own.to(dtype)).reshape(param.shape))

    return load


def whole_of_blocks(x: torch.Tensor, *, dim: int, units: int) -> torch.Tensor:
    """The whole of a value that is cut into blocks, of which several ranks may hold one."""
    ranks = get_tensor_model_parallel_world_size()
    whole = all_gathered(x, dim=dim)
    if ranks <= units:
        return whole
    return torch.cat(whole.chunk(ranks, dim)[:: ranks // units], dim)


def all_gathered(x: torch.Tensor, *, dim: int) -> torch.Tensor:
    """The parts of all ranks; whole numbers go as bits, for on a CPU vLLM sends no others."""
    if x.is_complex():
        return torch.view_as_complex(all_gathered(torch.view_as_real(x), dim=dim))
    if x.is_floating_point():
        return tensor_model_parallel_all_gather(x.contiguous(), dim=dim)
    bits = x.to(torch.int64).unsqueeze(-1).view(torch.float32)
    whole = tensor_model_parallel_all_gather(bits.contiguous(), dim=dim)
    return whole.view(torch.int64).squeeze(-1).to(x.dtype)


def numbers_summed(x: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks of whole numbers."""
    return all_gathered(x.unsqueeze(0), dim=0).sum(0, dtype=x.dtype)


def max_over_ranks(x: torch.Tensor, *, dim: int) -> torch.Tensor:
    """The largest over a dim of which each rank has a part."""
    return all_gathered(x.amax(dim, True), dim=dim).amax(dim, True)


def min_over_ranks(x: torch.Tensor, *, dim: int) -> torch.Tensor:
    """The least over a dim of which each rank has a part."""
    return all_gathered(x.amin(dim, True), dim=dim).amin(dim, True)


def rms_norm_over_ranks(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    rounds_once: bool = False,
) -> torch.Tensor:
    """Root-mean-square norm over a dim of which each rank has a part: their squares are summed."""
    wide = x.float()
    squares = tensor_model_parallel_all_reduce(wide.pow(2).sum(-1, keepdim=True))
    count = x.shape[-1] * get_tensor_model_parallel_world_size()
    unit = wide * torch.rsqrt(squares / count + eps)
    if offset or rounds_once:
        return (unit * (offset + weight.float())).to(x.dtype)
    return (unit.to(x.dtype) * weight).to(x.dtype)


def own_values(values: list) -> list:
    """This rank's part of a list with one value a head."""
    n = len(values) // get_tensor_model_parallel_world_size()
    return values[get_tensor_model_parallel_rank() * n :][:n]
