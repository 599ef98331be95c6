"""What an emitted class needs beside its lines: imports, local sizes, names of variables."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from compiler.emit.computed import computed_parameters
from compiler.emit.helpers import helpers
from compiler.emit.text import literal
from compiler.ir import Block, LocalSize, Sym
from compiler.modules import Placed
from compiler.names import class_name
from compiler.needs import Exact

_ROOT = "vllm.model_executor"
# Where each name that emitted source may use comes from.
IMPORTS = {
    "Any": "typing",
    "Callable": "collections.abc",
    "Iterable": "collections.abc",
    "islice": "itertools",
    "product": "itertools",
    "prod": "math",
    "re": "import",
    "torch": "",
    "F": "torch.nn",
    "nn": "torch",
    "rearrange": "einops",
    "safe_open": "safetensors",
    "_custom_ops": "vllm",
    "support_torch_compile": "vllm.compilation.decorators",
    "CompilationMode": "vllm.config",
    "VllmConfig": "vllm.config",
    "get_pp_group": "vllm.distributed",
    "get_tensor_model_parallel_rank": "vllm.distributed",
    "get_tensor_model_parallel_world_size": "vllm.distributed",
    "tensor_model_parallel_all_gather": "vllm.distributed",
    "tensor_model_parallel_all_reduce": "vllm.distributed",
    "get_forward_context": "vllm.forward_context",
    "init_logger": "vllm.logger",
    "CPUInt8ScaledMMLinearKernel": f"{_ROOT}.kernels.linear",
    "GeluAndMul": f"{_ROOT}.layers.activation",
    "SiluAndMul": f"{_ROOT}.layers.activation",
    "Attention": f"{_ROOT}.layers.attention",
    "EncoderOnlyAttention": f"{_ROOT}.layers.attention",
    "MLAAttention": f"{_ROOT}.layers.attention",
    "FusedMoEFactory": f"{_ROOT}.layers.fused_moe",
    "RoutedExperts": f"{_ROOT}.layers.fused_moe",
    "GemmaRMSNorm": f"{_ROOT}.layers.layernorm",
    "RMSNorm": f"{_ROOT}.layers.layernorm",
    "ColumnParallelLinear": f"{_ROOT}.layers.linear",
    "MergedColumnParallelLinear": f"{_ROOT}.layers.linear",
    "QKVParallelLinear": f"{_ROOT}.layers.linear",
    "ReplicatedLinear": f"{_ROOT}.layers.linear",
    "RowParallelLinear": f"{_ROOT}.layers.linear",
    "MambaBase": f"{_ROOT}.layers.mamba.abstract",
    "get_temporal_copy_spec": f"{_ROOT}.layers.mamba.mamba_utils",
    "LogitsProcessor": f"{_ROOT}.layers.logits_processor",
    "DispatchPooler": f"{_ROOT}.layers.pooler",
    "PoolerClassify": f"{_ROOT}.layers.pooler.activations",
    "PoolerNormalize": f"{_ROOT}.layers.pooler.activations",
    "ClassifierPoolerHead": f"{_ROOT}.layers.pooler.seqwise",
    "EmbeddingPoolerHead": f"{_ROOT}.layers.pooler.seqwise",
    "SequencePooler": f"{_ROOT}.layers.pooler.seqwise",
    "get_seq_pooling_method": f"{_ROOT}.layers.pooler.seqwise",
    "get_rope": f"{_ROOT}.layers.rotary_embedding",
    "ParallelLMHead": f"{_ROOT}.layers.vocab_parallel_embedding",
    "VocabParallelEmbedding": f"{_ROOT}.layers.vocab_parallel_embedding",
    "sharded_weight_loader": f"{_ROOT}.model_loader.weight_utils",
    "SupportsLoRA": f"{_ROOT}.models.interfaces",
    "SupportsPP": f"{_ROOT}.models.interfaces",
    "AutoWeightsLoader": f"{_ROOT}.models.utils",
    "PPMissingLayer": f"{_ROOT}.models.utils",
    "WeightsMapper": f"{_ROOT}.models.utils",
    "make_empty_intermediate_tensors_factory": f"{_ROOT}.models.utils",
    "make_layers": f"{_ROOT}.models.utils",
    "maybe_prefix": f"{_ROOT}.models.utils",
    "set_weight_attrs": f"{_ROOT}.utils",
    "current_platform": "vllm.platforms",
    "IntermediateTensors": "vllm.sequence",
    "direct_register_custom_op": "vllm.utils.torch_utils",
    "MambaAttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "LinearAttentionBackend": "vllm.v1.attention.backends.linear_attn",
    "KVCacheLayout": "vllm.v1.kv_cache_layout",
    "KVCacheSpec": "vllm.v1.kv_cache_interface",
}
# Names that a variable must leave as they are.
_TAKEN = {*IMPORTS, "enumerate", "range", "self", "zip"}


@dataclass
class Module:
    """The file being written.

    Args:
        prefix: what class names begin with.
        axes: axis name -> size, for those that have one size throughout the model.
        exact: what of the axes the ranks always divide.
        task: the model's.
        has_latent: whether config.json speaks of latents, which the engine may cache.
        used: names to import.
        constants: axes whose constant is used.
        helpers: functions and classes of `compiler.emit.helpers` to carry along.
    """

    prefix: str
    axes: dict[str, int]
    exact: Exact
    task: str = "generate"
    has_latent: bool = False
    used: set[str] = field(default_factory=set)
    constants: dict[str, int] = field(default_factory=dict)
    helpers: set[str] = field(default_factory=set)

    def use(self, name: str) -> str:
        """A name, imported."""
        assert name in IMPORTS, name
        self.used.add(name)
        return name

    def help(self, name: str) -> str:
        """A helper's name, carried along."""
        if name not in self.helpers:
            self.helpers.add(name)
            for needed in sorted(helpers()[name].names - {name}):
                if needed in helpers():
                    self.help(needed)
                elif needed in IMPORTS:
                    self.use(needed)
        return name

    def size(self, axis: str, size: int) -> str:
        """A size by its axis's constant, `HIDDEN`, or as a number."""
        if self.axes.get(axis) != size:
            return str(size)
        self.constants[axis.upper()] = size
        return axis.upper()

    def class_name(self, block: str) -> str:
        name = self.prefix + class_name(block)
        taken = name in IMPORTS or name in helpers()  # `attention` of a model named Latent
        return f"{name}Block" if taken else name


@dataclass
class Scope:
    """One class: its block, its place, and what its lines have asked for so far."""

    module: Module
    block: Block
    placed: Placed
    local: dict[str, tuple[str, int]] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)
    preferred: dict[fx.Node, str] = field(default_factory=dict)
    needs_dtype: bool = False
    methods: dict[str, list[str]] = field(default_factory=dict)
    method: str = ""  # of the class, where it is not the forward function that is written
    symbols: set[str] = field(default_factory=set)
    _last: dict[fx.Node, int] = field(default_factory=dict)
    _bound: dict[str, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order = {n: i for i, n in enumerate(self.block.graph.nodes)}
        for node, i in self.order.items():
            for used in node.all_input_nodes:
                self._last[used] = i
        self.computed = computed_parameters(self.block, self.placed.bare)
        for name, computed in self.computed.items():
            self.names[computed.value] = f"self.{self.placed.bare[name]}"
        self.loaded = {node for each in self.computed.values() for node in each.chain}

    def local_size(self, size: LocalSize) -> str:
        """`self.local_heads * 64`."""
        name = self.local_units(size.label, size.units)
        return name if size.inner == 1 else f"{name} * {self.module.size('head_dim', size.inner)}"

    def local_units(self, axis: str, units: int) -> str:
        """`self.local_heads`; a second size of the same axis in one class has its number added."""
        for name in (f"local_{axis}", f"local_{axis}_{units}"):
            if self.local.setdefault(name, (axis, units)) == (axis, units):
                break
        return f"self.{name}"

    def bind(self, node: fx.Node, name: str | None = None) -> str:
        """A variable for a node: its own plain name, unless that still holds a value to come."""
        base = name or self.preferred.get(node) or re.sub(r"_\d+$", "", node.name)
        chosen, count = base, 1
        while chosen in _TAKEN or chosen in helpers() or self._busy(chosen, node):
            count += 1
            chosen = f"{base}_{count}"
        self._bound[chosen] = node
        self.names[node] = chosen
        return chosen

    def device(self) -> str:
        """Where the class's tensors lie: its last input's place, for the engine may give no ids."""
        given = [node for node in self.block.inputs if "optional" not in node.meta]
        if given:
            return f"{self.names[given[-1]]}.device"
        return f"self.{next(iter(self.placed.bare.values()))}.device"

    def _busy(self, name: str, node: fx.Node) -> bool:
        """Whether a variable's value is still needed after this node."""
        holder = self._bound.get(name)
        return holder is not None and self._last.get(holder, -1) > self.order[node]

    def value(self, arg: Any) -> str:
        """An argument's source text."""
        if isinstance(arg, fx.Node):
            if arg.op == "get_attr" and arg not in self.names:
                return f"self.{self.placed.bare[str(arg.target)]}"
            return self.names[arg]
        if isinstance(arg, LocalSize):
            return self.local_size(arg)
        if isinstance(arg, Sym):
            self.symbols |= set(re.findall(r"[a-z_]+", arg.expr))
            return arg.expr
        if isinstance(arg, (tuple, list)):
            inner = [self.value(a) for a in arg]
            if isinstance(arg, list):
                return f"[{', '.join(inner)}]"
            return f"({', '.join(inner)}{',' if len(inner) == 1 else ''})"
        return literal(arg)
