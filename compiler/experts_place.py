"""Where the tensors of experts go: vLLM's layer loads `experts.3.gate_proj.weight`, one at a time.

A checkpoint that names them so is loaded as it is; one tensor for all experts is taken apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from funcmodels.errors import LoweringError
from funcmodels.weightmap import TensorMap

# What checkpoints call gate, up and down; vLLM's layer is told which.
LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True)
class ExpertTensors:
    """One of a layer's matrices or biases, of all experts: where each expert's part loads.

    Args:
        names: the checkpoint's tensors: one an expert, or one that holds all of them.
        parts: names under the layer, one an expert.
        template: these names, with {} for the expert, of a tensor that holds all of them.
        layout: einops pattern from a part's layout to the layer's, None for the same.
        sizes: the axes' sizes that the pattern needs.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]
    layout: str | None
    sizes: tuple[tuple[str, int], ...]
    template: str | None


def without_spread(map_: TensorMap) -> str:
    """The name of a parameter's tensor, without the index of a dim that is spread over several."""
    first, last = map_.names[0].split("."), map_.names[-1].split(".")
    if not map_.spread or len(first) != len(last):
        return map_.names[0]
    return ".".join(a for a, b in zip(first, last, strict=True) if a == b)


def experts_name(parents: list[str | None]) -> str:
    """The attribute of a layer of experts: the checkpoint's, and `experts` at its end for vLLM."""
    parent = parents[0] if len(set(parents)) == 1 else None
    if parent is None:
        return "experts"
    return parent if parent.rpartition(".")[2] == "experts" else f"{parent}.experts"


def leaves_of(
    node: fx.Node, names: Mapping[str, str], maps: Mapping[str, TensorMap]
) -> tuple[str, ...]:
    """What gate, up and down are called in the layer."""
    paths = [names[str(p.target)] for p in node.args[3]]  # type: ignore[union-attr]
    stored = tuple(maps[p].names[0].removesuffix(".weight").rpartition(".")[2] for p in paths)
    return stored if stored in LEAVES and all(maps[p].spread for p in paths) else LEAVES[0]


def expert_tensors(
    node: fx.Node, names: Mapping[str, str], maps: Mapping[str, TensorMap], module: str
) -> Iterator[ExpertTensors]:
    """The tensors of a layer.

    Raises:
        LoweringError: one of all experts that does not hold them one after another.
    """
    leaves = leaves_of(node, names, maps)
    for kind, params in (("weight", node.args[3]), ("bias", node.args[4])):
        for leaf, param in zip(leaves, params, strict=False):  # type: ignore[arg-type]
            if param is None:
                continue
            map_ = maps[names[str(param.target)]]  # type: ignore[union-attr]
            axis, *rest = map_.axes
            sizes = dict(map_.sizes)
            template = f"{module}.{{}}.{leaf}.{kind}"
            parts = tuple(template.format(e) for e in range(sizes[axis]))
            stored = map_.layout.split()
            if not map_.spread and stored[0] == axis:
                stored = stored[1:]
            elif map_.spread != (axis,):
                raise LoweringError(
                    f"the experts of {names[str(param.target)]} do not lie one after another",
                    got=f"{map_.names[0]}: {map_.layout}",
                    need=f'"{axis}" first, or spread over tensors by {{{axis}}} in their name',
                    from_=node.meta["where"],
                    fix="store them so",
                )
            layout = None if stored == rest else f"{' '.join(stored)} -> {' '.join(rest)}"
            whole = None if map_.spread else template
            yield ExpertTensors(map_.names, parts, layout, map_.sizes if layout else (), whole)
