"""How a served model loads: renames, fused parts and layouts, as vLLM's own mapper has them."""

from __future__ import annotations

import functools
import graphlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from compiler.fold_names import Indices
from compiler.modules import Destination, Plan
from compiler.taken_apart import TakenApart
from funcmodels.spec import Model

Stacked = dict[str, tuple[str, "str | int"]]
SharedTensor = tuple[int, int, int, bool, dict[str, int]]


@dataclass
class Loading:
    """What `load_weights` does with the checkpoint's names and tensors.

    Args:
        regex: pattern -> replacement, for tensors that the module tree names otherwise.
        stacked: part of a name -> (part of the fused name, shard), as vLLM's mapper takes it.
        layouts: pattern of names -> (einops pattern, sizes), for tensors stored in another layout.
        ignored: patterns of names to pass over.
        prefix, prefixed: a beginning of names that may be left out, and what then comes first; or
            without `prefixed`, one that may be there and is not the model's.
        tied: names under which a tensor may be stored again -> the tensor's own name.
        head: the tensor that is the table of embedding and unembedding in one.
        split: tensors that are stacked -> their parts, in order.
        repeated: tensors that several layers have -> what each has it as.
        shared: pattern of tensors that are several parameters -> dim, turns, unit, whether they
            make one layer, and the parts' names and numbers of units.
        experts: pattern of tensors that hold all experts -> each one's name, with {} for it.
        tensors: names of the checkpoint, with "*" for indices -> the values of each index.
        lora_targets: the same, of the modules that adapters may change.
    """

    regex: dict[str, str] = field(default_factory=dict)
    stacked: Stacked = field(default_factory=dict)
    layouts: dict[str, tuple[str, tuple[tuple[str, int], ...]]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    prefixed: tuple[str, ...] = ()
    tied: dict[str, str] = field(default_factory=dict)
    head: str | None = None
    tensors: dict[str, tuple[Indices, ...]] = field(default_factory=dict)
    lora_targets: dict[str, tuple[Indices, ...]] = field(default_factory=dict)
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    repeated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared: dict[str, SharedTensor] = field(default_factory=dict)
    experts: dict[str, str] = field(default_factory=dict)


def loading_of(plan: Plan, model: Model) -> Loading:
    """The smallest mapping that takes every tensor to its place, checked on every one of them."""
    loading = Loading()
    loading.stacked = _stacked(plan)
    alike: dict[str, dict[str, tuple[str, Destination]]] = {}  # pattern -> name -> where it goes
    for name, to in plan.tensors.items():
        pattern, new = _template(name, _unfused(to))
        alike.setdefault(pattern, {})[name] = (new, to)
    renamed: dict[str, list[str]] = {}
    for pattern, group in alike.items():
        # Layers of different kinds may keep tensors of one name in different places.
        one = len({(new, to.layout) for new, to in group.values()}) == 1
        for name, (new, to) in group.items():
            of = pattern if one else f"^{re.escape(name)}$"
            if name != _unfused(to):
                loading.regex[of] = new if one else _unfused(to)
                renamed.setdefault(of, []).append(_unfused(to))
            if to.layout is not None:
                loading.layouts[of] = (to.layout, _needed(to))
    loading.regex = {of: loading.regex[of] for of in _none_twice(renamed)}
    loading.experts = _patterns(plan.split)
    loading.prefix, loading.prefixed = model.hf_prefix, tuple(sorted(model.prefixed))
    loading.ignored = (*map(_glob, model.hf_ignored), *_unused(plan, model))
    loading.tied = {name: model.tensor_maps[path].names[0] for name, path in model.hf_tied.items()}
    if plan.head is not None:
        (loading.head,) = model.tensor_maps[plan.head].names
        # A name that no pattern of ignored tensors means.
        loading.regex[r"^tied_head\.weight$"] = "lm_head.weight"
    loading.tensors = _compact(list(plan.tensors))
    if isinstance(model, TakenApart):
        loading.split, loading.repeated = model.split, model.repeated
        loading.shared = _shared(model, plan)
    loading.lora_targets = _compact(list(dict.fromkeys(plan.lora_targets)))
    for name, to in plan.tensors.items():
        got = apply(loading, name)
        assert got == (to.param, to.shard), f"{name} would be loaded to {got}, not to {to}"
    return loading


def _shared(model: TakenApart, plan: Plan) -> dict[str, SharedTensor]:
    """Tensors that are several parameters, those of all layers in one pattern."""
    found: dict[str, SharedTensor] = {}
    for name, shared in model.shared.items():
        named = [_template(name, part) for part, _ in shared.parts]
        counts = [count for _, count in shared.parts]
        to = {plan.tensors[part].param for part, _ in shared.parts if part in plan.tensors}
        at = shared.dim, shared.turns, shared.unit, len(to) == 1
        value = *at, dict(zip((new for _, new in named), counts, strict=True))
        if found.setdefault(named[0][0], value) != value:
            found[f"^{re.escape(name)}$"] = *at, dict(shared.parts)
    # A name of its own is looked up before the pattern that means it too.
    return dict(sorted(found.items(), key=lambda item: r"(\d+)" in item[0]))


def _patterns(names: Mapping[str, str]) -> dict[str, str]:
    """Names and what they become, by a pattern for any index where that says it for all of them."""
    found: dict[str, set[str]] = {}
    for name, new in names.items():
        pattern, replaced = _template(name, new)
        found.setdefault(pattern, set()).add(replaced)
    out: dict[str, str] = {}
    for name, new in names.items():
        pattern, replaced = _template(name, new)
        one = len(found[pattern]) == 1
        out |= {pattern: replaced} if one else {f"^{re.escape(name)}$": new}
    return out


def _none_twice(renamed: Mapping[str, list[str]]) -> Iterable[str]:
    """Patterns in an order in which none finds a name that one before it has made.

    vLLM applies them one after the other. Where a part of `in_proj.bias` becomes `dt_bias`, and the
    checkpoint's own `dt_bias` something else, that one is renamed first.

    Args:
        renamed: pattern -> what the tensors that it finds become.
    """
    found_by = {of: re.compile(of) for of in renamed}
    before = {
        of: [p for p in renamed if p != of and any(map(found_by[p].search, names))]
        for of, names in renamed.items()
    }
    return graphlib.TopologicalSorter(before).static_order()


def _unused(plan: Plan, model: Model) -> list[str]:
    """Patterns of the tensors that no operation reads, as a gate of the first layer alone."""
    names = [n for path in model.by_path for n in model.tensor_maps[path].names]
    found = []
    known = {*plan.tensors, *plan.split}
    for name, indices in _compact([n for n in names if n not in known]).items():
        parts = (f"(?:{'|'.join(map(str, values))})" for values in indices)
        found.append(re.sub(r"\\\*", lambda _: next(parts), f"^{re.escape(name)}$"))  # noqa: B023
    return found


def apply(loading: Loading, name: str) -> tuple[str, str | int | None]:
    """Where vLLM's mapper takes a name: the module parameter, and the part of it."""
    for pattern, new in loading.regex.items():
        name = re.sub(pattern, new, name)
    shard: str | int | None = None
    for part, (new, number) in loading.stacked.items():
        if part in name:
            name, shard = name.replace(part, new, 1), number
    return name, shard


def _unfused(to: Destination) -> str:
    """The parameter's name before fusing."""
    if not to.fused:
        return to.param
    module, _, kind = to.param.rpartition(".")
    return f"{module.rpartition('.')[0]}.{to.leaf}.{kind}".removeprefix(".")


def _stacked(plan: Plan) -> Stacked:
    """Parts of names, each as short as it can be without meaning another tensor too."""
    found: Stacked = {}
    names = {_unfused(to): to for to in plan.tensors.values()}
    for unfused, to in names.items():
        known = any(part in unfused and shard == to.shard for part, (_, shard) in found.items())
        if not to.fused or to.shard is None or known:
            continue
        for before, after in _parts_of(unfused.rpartition(".")[0].split(".")[:-1]):
            part = f"{before}.{to.leaf}{after}"
            if all(
                (o.leaf, o.fused) == (to.leaf, to.fused)
                for other, o in names.items()
                if part in other
            ):
                found[part] = (f"{before}.{to.fused}{after}", to.shard)
                break
        else:
            raise AssertionError(f"no part of {unfused} is its own")
    return found


def _parts_of(parents: list[str]) -> list[tuple[str, str]]:
    """What to put around a module's name until it means no other: less first.

    A dot always ends it: quantised tensors have names as `k.qweight`, where `.q` must find nothing.
    """
    longer = [f".{'.'.join(parents[-n:])}" for n in range(1, len(parents) + 1)]
    return [("", "."), *((before, ".") for before in longer)]


def _template(name: str, new: str) -> tuple[str, str]:
    """A pattern for a name with any list index, and the new name with the same indices."""
    parts, replaced = name.split("."), new.split(".")
    found = 0
    for at in range(1, len(parts) - 1):
        if parts[at].isdigit():
            found += 1
            if parts[at] in replaced[1:-1]:
                replaced[replaced.index(parts[at], 1)] = f"\\{found}"
            parts[at] = r"(\d+)"
    parts = [p if p.isidentifier() or p == r"(\d+)" else re.escape(p) for p in parts]
    return "^" + r"\.".join(parts) + "$", ".".join(replaced)


def _compact(names: list[str]) -> dict[str, tuple[Indices, ...]]:
    """Names by pattern, with the values of each index; in full where not all are combined."""
    found: dict[str, list[Indices]] = {}
    for name in names:
        parts = name.split(".")
        pattern = ".".join("*" if part.isdigit() else part for part in parts)
        found.setdefault(pattern, []).append(tuple(int(p) for p in parts if p.isdigit()))
    out: dict[str, tuple[Indices, ...]] = {}
    for pattern, rows in found.items():
        columns = tuple(tuple(sorted(set(column))) for column in zip(*rows, strict=True))
        if len(rows) == prod(map(len, columns)):
            out[pattern] = columns
        else:
            for row in rows:
                out[functools.reduce(lambda p, i: p.replace("*", str(i), 1), row, pattern)] = ()
    return out


def _glob(pattern: str) -> str:
    """A name with `*` for anything, as a regular expression."""
    return "^" + re.escape(pattern).replace(r"\*", ".*") + "$"


def _needed(to: Destination) -> tuple[tuple[str, int], ...]:
    """The sizes that a layout's groups leave open."""
    left = (to.layout or "").partition("->")[0]
    grouped = " ".join(re.findall(r"\(([^)]*)\)", left)).split()
    return tuple((axis, n) for axis, n in to.sizes if axis in grouped)
