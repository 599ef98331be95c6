"""A lower bound for the time of a step, from what an accelerator can do at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compiler.explain.records import BlockView, Collective, Stage, Work


@dataclass(frozen=True)
class Device:
    """What one accelerator can do at most.

    Args:
        name: as it is to be shown.
        flops: additions and multiplications a second, of products of dense matrices in the dtype
            that the weights have.
        bandwidth: bytes a second from its own memory.
        link: bytes a second that it sends to the others of its group, in one direction.
        memory: bytes.
        latency: seconds that one collective takes at the least, whatever its size; 0 counts bytes
            alone. Measure it: for small steps it is most of the time.
    """

    name: str
    flops: float
    bandwidth: float
    link: float
    memory: float
    latency: float = 0.0


DEVICES = {
    "a100": Device("NVIDIA A100 SXM 80 GB", 312e12, 2.039e12, 300e9, 80e9),
    "h100": Device("NVIDIA H100 SXM 80 GB", 989.4e12, 3.35e12, 450e9, 80e9),
    "h200": Device("NVIDIA H200 SXM 141 GB", 989.4e12, 4.8e12, 450e9, 141e9),
    "b200": Device("NVIDIA B200 SXM 180 GB", 2250e12, 8e12, 900e9, 180e9),
    "mi300x": Device("AMD Instinct MI300X 192 GB", 1307.4e12, 5.3e12, 448e9, 192e9),
}
"""Published figures: 16-bit floating point without sparsity, and half of the links' two-way sum.

Sources: the makers' data sheets, "NVIDIA A100 Tensor Core GPU" (2021), "NVIDIA H100 Tensor Core
GPU" (2023), "NVIDIA H200 Tensor Core GPU" (2024), "NVIDIA DGX B200" (2024; an eighth of it),
"AMD Instinct MI300X Accelerator" (2023).
"""


@dataclass(frozen=True)
class Phase:
    """The time of one step.

    Args:
        tokens: that the step computes.
        context: tokens that each sequence has in the end.
        seconds: through all stages, one after another.
        slowest: of the slowest stage: with all stages busy, a step ends as often.
        compute, memory, links: what each alone would take, in seconds; the largest is the bound.
    """

    tokens: int
    context: int
    seconds: float
    slowest: float
    compute: float
    memory: float
    links: float

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        found = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(found, key=lambda name: found[name])

    @property
    def tokens_per_second(self) -> float:
        """With as many steps under way as there are stages."""
        return self.tokens / self.slowest


@dataclass(frozen=True)
class Estimate:
    """A roofline estimate: no step can be faster on these devices, and real ones are slower.

    Every operation takes the longer of its arithmetic and its reading of weights and KV cache;
    operations and collectives follow each other. Activations are taken to stay in the caches, and
    element-wise operations to be free. Tokens are taken to choose experts evenly: a step reads as
    many as they then share.

    Args:
        prefill: one prompt.
        decode: one token for each sequence of a batch.
        kv_tokens: tokens of KV cache that fit beside the weights on the fullest rank; none of the
            memory is kept for activations here.

    Source: Williams, Waterman & Patterson 2009, "Roofline".
    """

    device: Device
    batch: int
    prefill: Phase
    decode: Phase
    kv_tokens: int


def estimate(
    device: Device,
    blocks: Sequence[BlockView],
    stages: Sequence[Stage],
    *,
    prompt: int,
    batch: int,
    context: int,
) -> Estimate:
    """The times of a prompt of so many tokens, and of a step of a batch with so long a context."""
    prefill = _phase(device, blocks, stages, _Load(prompt, 1, prompt, prompt))
    decode = _phase(device, blocks, stages, _Load(batch, batch, 1, context))
    room = [
        max(0.0, device.memory - stage.weights) / stage.kv_per_token
        for stage in stages
        if stage.kv_per_token
    ]
    return Estimate(device, batch, prefill, decode, int(min(room, default=0)))


@dataclass(frozen=True)
class _Load:
    """A step: all its tokens, those sampled from, and of each sequence the new ones and all."""

    tokens: int
    sampled: int
    new: int
    context: int

    def pairs(self, window: int | None) -> int:
        """Pairs of a new token and one that it looks at."""
        before = self.context - self.new
        reach = self.context if window is None else min(window, self.context)
        # The first tokens look at fewer than the window holds.
        rising = max(0, min(self.new, reach - before))
        each = rising * before + rising * (rising + 1) // 2 + (self.new - rising) * reach
        return each * (self.tokens // self.new)

    def kept(self, window: int | None) -> int:
        """Tokens whose keys and values are read, and those written."""
        reach = self.context if window is None else min(window + self.new - 1, self.context)
        return (reach + self.new) * (self.tokens // self.new)


def _phase(
    device: Device, blocks: Sequence[BlockView], stages: Sequence[Stage], load: _Load
) -> Phase:
    times = []
    compute = memory = links = 0.0
    for i, stage in enumerate(stages):
        seconds = stage.sends * load.tokens / device.link
        links += seconds
        for block in blocks:
            count = block.stages[i]
            for step in block.steps if count else ():
                flops, size = _cost(step.work, load)
                sent = _sent(step.collective, load, device)
                compute += count * flops / device.flops
                memory += count * size / device.bandwidth
                links += count * sent
                longer = max(flops / device.flops, size / device.bandwidth)
                seconds += count * (longer + sent)
        times.append(seconds)
    return Phase(load.tokens, load.context, sum(times), max(times), compute, memory, links)


def _cost(work: Work, load: _Load) -> tuple[float, float]:
    """Arithmetic, and bytes from memory."""
    tokens = load.sampled if work.is_per_sample else load.tokens
    flops = work.flops * tokens + work.attention_flops * load.pairs(work.window)
    read = work.weight_bytes * (1 - (1 - work.chosen) ** tokens)  # of experts, by even routing
    size = read + work.token_bytes * tokens
    size += 2 * work.state_bytes * (load.tokens // load.new)  # read and written
    return flops, size + (work.kv_bytes * load.kept(work.window) if work.kv_bytes else 0)


def _sent(collective: Collective | None, load: _Load, device: Device) -> float:
    """Seconds of a collective."""
    if collective is None:
        return 0.0
    tokens = load.sampled if collective.is_per_sample else load.tokens
    return collective.wire * tokens / device.link + device.latency
