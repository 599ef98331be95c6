"""What an explanation says, as plain data: parameters, operations and collectives of each block.

A model's layers are folded: a block is told once, with the number of times it is there, and
`layers.*.attn.q` stands for the parameter of every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from funcmodels.source import SourceLine


@dataclass(frozen=True)
class Parameter:
    """A declared parameter, or as many of them as differ in their place in lists only.

    Args:
        name, step: its name in its block, and the layer there; "" where plain torch reads it.
        path: in the pytree, with `*` for indices.
        paths: each one of them in full.
        shape, axes: as declared.
        local_shape: what a rank holds, in the declared order of dims; a vocabulary with the rows
            that vLLM pads it by.
        dtype: what a rank holds it in: "bfloat16".
        bytes: of one of them on one rank, padding included.
        padding: of these bytes, those that belong to no row of the vocabulary.
        replicas: on how many ranks each block of it lies; 1 where the ranks divide it, the number
            of ranks where it is not cut.
        layer: vLLM's class that holds it, or "nn.Parameter" where plain torch reads it.
        module: the module's parameter, with `*` for indices: "model.layers.*.attn.qkv.weight".
        modules: each one of them in full, as `paths`: a parameter that several layers share is in
            the module of each, whatever its own index is.
        part: which part of a fused module it is: "q", "0", or "" for all of it.
        is_quantisable: whether vLLM's schemes for linear layers apply to it.
        is_lora_target: whether an adapter can name it.
        where: the line that declares it.
        stages: for each pipeline stage, how many of them it holds.
    """

    name: str
    step: str
    path: str
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    local_shape: tuple[int, ...]
    dtype: str
    bytes: int
    padding: int
    replicas: int
    layer: str
    module: str
    modules: tuple[str, ...]
    part: str
    is_quantisable: bool
    is_lora_target: bool
    where: SourceLine
    stages: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Collective:
    """What ranks send each other for one operation.

    Args:
        kind: "all_reduce", "all_gather" or "all_to_all".
        bytes: of the whole value, for each token, or for each token that is sampled from.
        is_per_sample: whether it is done for the tokens that are sampled from alone.
        wire: bytes that each rank sends for it, by a ring.
        why: what asks for it.
    """

    kind: str
    bytes: int
    is_per_sample: bool
    wire: int
    why: str


@dataclass(frozen=True)
class Work:
    """What an operation costs on one rank.

    Args:
        flops: for each token, attention over other tokens aside.
        weight_bytes: read once a step, for however many tokens.
        token_bytes: read for each token beside that: the row of an embedding table.
        attention_flops: for each pair of a query token and a key token.
        kv_bytes: of the KV cache, for each token.
        state_bytes: of a recurrent state, for each sequence, however long.
        window: how many tokens attention looks back at, or None for all.
        is_per_sample: whether it is done for the tokens that are sampled from alone.
        cached: what the KV cache holds of a token, where that is not its keys and values.
        chosen: the share of `weight_bytes` that one token reads: that of its experts; 1 reads all.
        axes: that what it reads is cut over.
        cache_axis: of the heads that the KV cache holds, where it is cut over them.
    """

    flops: int = 0
    weight_bytes: int = 0
    token_bytes: int = 0
    attention_flops: int = 0
    kv_bytes: int = 0
    state_bytes: int = 0
    window: int | None = None
    is_per_sample: bool = False
    cached: str = ""
    chosen: float = 1.0
    axes: tuple[str, ...] = ()
    cache_axis: str = ""


@dataclass(frozen=True)
class Step:
    """One statement of a block.

    Args:
        name: of its result.
        kind: "layer", "plain" (left to torch), "view" (moves no memory), "collective" or "block".
        title: the layer's class, torch's function, the collective or the called block.
        attr: the attribute of a layer or a called block, in its block.
        code: the emitted statement.
        arguments: of the layer's constructor, as emitted.
        where, text: the line of the user's, and what is written there.
        why: for what is left in plain torch.
        shape: of the result on one rank.
        inputs: the names of the steps and inputs that it reads.
        parameters: the names, in its block, of the parameters that it reads.
        is_product: whether it is a plain product with a parameter, or with what is made from some.
    """

    name: str
    kind: str
    title: str
    attr: str
    code: str
    where: SourceLine
    text: str
    shape: str
    arguments: tuple[str, ...] = ()
    why: str = ""
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    work: Work = Work()
    collective: Collective | None = None
    is_product: bool = False


@dataclass(frozen=True)
class BlockView:
    """A block of the served model, told once.

    Args:
        name: of the user's function; "forward" and "compute_logits" are the two parts of the root.
        class_name: of the emitted module.
        places: the modules that are instances of it.
        stages: for each pipeline stage, how many instances run on it.
        inputs: what it is given.
        results: the names of the steps that it returns.
        where: the line that the user's function begins on.
        static: the settings that the user's function was called with, as text.
    """

    name: str
    class_name: str
    places: tuple[str, ...]
    stages: tuple[int, ...]
    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    results: tuple[str, ...]
    where: SourceLine | None
    parameters: tuple[Parameter, ...] = field(default=())
    static: tuple[tuple[str, str], ...] = ()

    @property
    def count(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Stage:
    """What one rank of a pipeline stage holds and does.

    Args:
        layers: the numbers of its layers.
        weights: bytes.
        kv_per_token: bytes of the KV cache for each token, of windowed layers too.
        state_per_sequence: bytes of recurrent states for each sequence.
        collectives: how many a step takes, those for sampling included.
        collective_bytes: of the values that they are of, for each token.
        sends: bytes for each token to the next stage.
    """

    layers: tuple[int, ...]
    weights: int
    kv_per_token: int
    state_per_sequence: int
    collectives: dict[str, int]
    collective_bytes: int
    sends: int
