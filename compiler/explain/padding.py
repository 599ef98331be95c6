"""What heads of zeros cost: those of `fm.pad_heads`, on each rank of a served model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from compiler.explain.records import BlockView, Parameter, Stage, Step

Sizes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Cost:
    """What a rank holds and does, or a part of it.

    Args:
        weights: bytes.
        kv_per_token: bytes of the KV cache for each token.
        flops: of products, for each token; not of those for sampled tokens alone.
        attention_flops: for each pair of a query token and a key token.
    """

    weights: int = 0
    kv_per_token: int = 0
    flops: int = 0
    attention_flops: int = 0


@dataclass(frozen=True)
class PaddedRanks:
    """Ranks of a stage that hold as many zeros as each other.

    Args:
        stage, ranks: the pipeline stage, and the ranks that share its layers.
        heads: axis -> how many heads each of them has, and how many of these are zeros.
        all, zeros: what each of them holds and does, and what of that is for zeros.
    """

    stage: int
    ranks: tuple[int, ...]
    heads: dict[str, tuple[int, int]]
    all: Cost
    zeros: Cost


@dataclass(frozen=True)
class HeadPadding:
    """Heads that are zeros, and what they cost against the model without them.

    Args:
        sizes: axis -> (heads of the model that was padded, heads now); the last ones are zeros.
        ranks: of each stage, those that are alike together.
        unpadded: of each stage, what a rank would hold and do without zeros, if ranks could share
            the heads evenly.
    """

    sizes: dict[str, tuple[int, int]]
    ranks: tuple[PaddedRanks, ...]
    unpadded: tuple[Cost, ...]


def head_padding(
    sizes: Sizes, blocks: tuple[BlockView, ...], stages: tuple[Stage, ...], tp: int
) -> HeadPadding | None:
    """The cost of heads of zeros; None where there are none."""
    if not sizes:
        return None
    alike: list[PaddedRanks] = []
    unpadded = []
    for i in range(len(stages)):
        whole = _sum(_cost(block, block.stages[i], i) for block in blocks)
        each = [
            _sum(_zeros(b, b.stages[i], i, _Rank(sizes, r, tp)) for b in blocks) for r in range(tp)
        ]
        groups: dict[tuple[object, Cost], list[int]] = {}
        for r, zeros in enumerate(each):
            heads = {axis: _heads(size, r, tp) for axis, size in sizes.items()}
            groups.setdefault((tuple(heads.items()), zeros), []).append(r)
        for (_, zeros), ranks in groups.items():
            heads = {axis: _heads(size, ranks[0], tp) for axis, size in sizes.items()}
            alike.append(PaddedRanks(i, tuple(ranks), heads, whole, zeros))
        unpadded.append(_minus(whole, each))
    return HeadPadding(dict(sizes), tuple(alike), tuple(unpadded))


def _heads(size: tuple[int, int], rank: int, tp: int) -> tuple[int, int]:
    """How many heads a rank has, and how many of them are zeros, which are the last of all."""
    before, now = size
    each = max(1, now // tp)
    first = rank * now // tp
    return each, each - min(each, max(0, before - first))


@dataclass(frozen=True)
class _Rank:
    sizes: Sizes
    rank: int
    tp: int

    def share(self, axis: str, is_cut: bool = True) -> float:
        """Of what lies along an axis on this rank, the share that is zeros."""
        if axis not in self.sizes:
            return 0.0
        size = self.sizes[axis]
        have, zeros = _heads(size, self.rank if is_cut else 0, self.tp if is_cut else 1)
        return zeros / have

    def of(self, p: Parameter) -> float:
        """Of a parameter on this rank, the share that is zeros."""
        dims = zip(p.axes, p.shape, p.local_shape, strict=True)
        return 1 - prod(1 - self.share(axis, n != local) for axis, n, local in dims)


def _cost(block: BlockView, count: int, stage: int) -> Cost:
    works = [step.work for step in block.steps]
    flops = [w.flops for w in works if not w.is_per_sample]
    return Cost(
        sum(p.bytes * p.stages[stage] for p in block.parameters),
        sum(w.kv_bytes for w in works) * count,
        sum(flops) * count,
        sum(w.attention_flops for w in works) * count,
    )


def _zeros(block: BlockView, count: int, stage: int, at: _Rank) -> Cost:
    """What of `_cost` is for zeros on one rank."""
    works = [step.work for step in block.steps]
    flops = [s.work.flops * _share(block, s, at) for s in block.steps if not s.work.is_per_sample]
    return Cost(
        round(sum(p.bytes * p.stages[stage] * at.of(p) for p in block.parameters)),
        round(sum(w.kv_bytes * at.share(w.cache_axis) for w in works) * count),
        round(sum(flops) * count),
        round(sum(w.attention_flops * _most(w.axes, at) for w in works) * count),
    )


def _share(block: BlockView, step: Step, at: _Rank) -> float:
    """Of a product, the share that is with zeros: in a layer, that of its matrices."""
    held = [p for p in block.parameters if p.step == step.name and p.module.endswith("weight")]
    sizes = {p.name: prod(p.local_shape) for p in held}
    if not sizes:
        return _most(step.work.axes, at)
    shares = {p.name: at.of(p) for p in held}
    return sum(sizes[name] * shares[name] for name in sizes) / sum(sizes.values())


def _most(axes: Iterable[str], at: _Rank) -> float:
    """The share of zeros where values meet head by head: query heads lie with their KV heads."""
    return max((at.share(axis) for axis in axes), default=0.0)


def _sum(costs: Iterable[Cost]) -> Cost:
    rows = [(c.weights, c.kv_per_token, c.flops, c.attention_flops) for c in costs]
    return Cost(*map(sum, zip(*rows, strict=True)))


def _minus(whole: Cost, zeros: list[Cost]) -> Cost:
    """What is left of a rank without an even share of all zeros."""
    lost, n = _sum(zeros), len(zeros)
    return Cost(
        round(whole.weights - lost.weights / n),
        round(whole.kv_per_token - lost.kv_per_token / n),
        round(whole.flops - lost.flops / n),
        round(whole.attention_flops - lost.attention_flops / n),
    )
