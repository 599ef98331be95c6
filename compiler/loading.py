"""How a served model loads: renames, fused parts and layouts, as vLLM's own mapper has them."""

from __future__ import annotations

import functools
import graphlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

from compiler.emit.scope import Module
from compiler.emit.text import WIDTH, literal, quoted, table
from compiler.fold_names import Indices, fold_parts
from compiler.modules import Destination, Plan
from compiler.taken_apart import TakenApart
from funcmodels.spec import Model

Stacked = dict[str, tuple[str, "str | int"]]
SharedTensor = tuple[int, int, int, bool, dict[str, int]]
_LETTERS = "ijklmnop"


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
    # What the served class needs when it is made, so that it stands above it.
    helpers: ClassVar = ("AdaptersApart", "ModuleNames", "CheckpointNames")

    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    repeated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared: dict[str, SharedTensor] = field(default_factory=dict)
    experts: dict[str, str] = field(default_factory=dict)

    def tensor_lines(self, module: Module) -> list[str]:
        """The tables `TENSORS` and `LORA_TARGETS`."""
        return [
            "# Tensors of its checkpoint; a star stands for an index.",
            *_names_table(module, "TENSORS", self.tensors),
            "",
            "# What of it adapters may change.",
            *_names_table(module, "LORA_TARGETS", self.lora_targets),
            *self.split_lines(module),
            *self.shared_lines(module),
            *self.expert_lines(module),
        ]

    def split_lines(self, module: Module) -> list[str]:
        """The tables `SPLIT` and `REPEATED`, where there is anything to take apart."""
        if not self.split and not self.repeated:
            return []
        return [
            "",
            "# Tensors that are stacked, and the parts that layers have.",
            *_parts_table(module, "SPLIT", self.split),
            "",
            "# Tensors that several layers have.",
            *_parts_table(module, "REPEATED", self.repeated),
        ]

    def expert_lines(self, module: Module) -> list[str]:
        """The table `EXPERT_TENSORS`, where one tensor holds all experts."""
        if not self.experts:
            return []
        module.use("re")
        rows = {f"re.compile({_raw(name)})": _raw(new) for name, new in self.experts.items()}
        what = "# Tensors that hold all experts, and the name of each."
        return ["", what, *table("EXPERT_TENSORS", rows)]

    def shared_lines(self, module: Module) -> list[str]:
        """The table `SHARED`, where tensors are several parameters."""
        if not self.shared:
            return []
        module.use("re")
        what = [
            "# Tensors that hold several: the dim, the turns, the rows of a unit, if they make",
            "# a layer, and the units of each.",
        ]
        lines = ["", *what, "SHARED = {"]
        for pattern, (dim, turns, unit, is_one, parts) in self.shared.items():
            lines.append(f"    re.compile({_raw(pattern)}): ({dim}, {turns}, {unit}, {is_one}, {{")
            lines += [f"        {_raw(name)}: {count}," for name, count in parts.items()]
            lines.append("    }),")
        return [*lines, "}"]

    def mapper_lines(self, module: Module) -> list[str]:
        """The class attribute `hf_to_vllm_mapper`."""
        for name in (*self.helpers, "spelled_out"):
            module.help(name)
        lines = ["    hf_to_vllm_mapper = CheckpointNames(", "        LORA_TARGETS,"]
        if self.split or self.repeated:
            lines += ["        SPLIT,", "        REPEATED,"]
        if self.regex or self.ignored:
            module.use("re")
            lines.append("        orig_to_new_regex={")
            for pattern in self.ignored:
                lines.append(f"            re.compile({_raw(pattern)}): None,")
            for pattern, new in self.regex.items():
                lines.append(f"            re.compile({_raw(pattern)}): {_raw(new)},")
            lines.append("        },")
        if self.stacked:
            lines.append("        orig_to_new_stacked={")
            for part, (new, shard) in self.stacked.items():
                lines.append(f"            {quoted(part)}: ({quoted(new)}, {literal(shard)}),")
            lines.append("        },")
        return [*lines, "    )"]

    def load_lines(self, module: Module) -> list[str]:
        """The method `load_weights`."""
        head = (
            "    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:"
        )
        module.help("note_tensors")
        module.help("check_loaded")
        module.help("read_tensors")
        tied = []
        if self.tied:
            tied += [f"        weights = {module.help('drop_tied')}(weights, {literal(self.tied)})"]
        if self.head:
            arguments = f"weights, {quoted(self.head)}, self.lm_head"
            tied.append(f"        weights = {module.help('add_head')}({arguments})")
        loader = [
            *tied,
            "        weights = note_tensors(weights, self.awaited)",
            "        loader = AutoWeightsLoader(self)",
            "        loaded = loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)",
            "        check_loaded(self.awaited)",
            "        return loaded",
        ]
        read = ["        weights = read_tensors(weights)"]
        if self.prefixed:
            arguments = f"weights, {quoted(self.prefix)}, {literal(self.prefixed)}"
            read += [f"        weights = {module.help('with_prefix')}({arguments})"]
        elif self.prefix:
            arguments = f"weights, {quoted(self.prefix)}"
            read += [f"        weights = {module.help('without_prefix')}({arguments})"]
        if self.shared:
            read += [f"        weights = {module.help('set_apart')}(weights, SHARED, self.awaited)"]
        if self.split or self.repeated:
            read += [f"        weights = {module.help('take_apart')}(weights, SPLIT, REPEATED)"]
        if self.experts:
            read += [f"        weights = {module.help('each_expert')}(weights, EXPERT_TENSORS)"]
        if not self.layouts:
            return [head, *read, *loader]
        module.use("rearrange")
        module.use("re")
        lines = [
            "    # How the checkpoint lays tensors out, and how vLLM's layers do.",
            "    layouts = {",
        ]
        for pattern, (layout, sizes) in self.layouts.items():
            value = f"({quoted(layout)}, {literal(dict(sizes))})"
            lines.append(f"        re.compile({_raw(pattern)}): {value},")
        return [
            *lines,
            "    }",
            "",
            head,
            *read,
            "        weights = ((name, self.relayout(name, w)) for name, w in weights)",
            *loader,
            "",
            "    def relayout(self, name: str, weight: torch.Tensor) -> torch.Tensor:",
            "        for pattern, (layout, sizes) in self.layouts.items():",
            "            if pattern.fullmatch(name):",
            "                return rearrange(weight, layout, **sizes)",
            "        return weight",
        ]


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


def _names_table(module: Module, name: str, names: dict[str, tuple[Indices, ...]]) -> list[str]:
    """Names with stars, each with the values of its indices."""
    rows = {
        quoted(pattern): f"[{', '.join(_indices(module, values) for values in indices)}]"
        for pattern, indices in names.items()
    }
    return table(name, rows)


def _parts_table(module: Module, name: str, names: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Tensors of the checkpoint, and lists of those that are made of each."""
    lines = []
    for tensor, columns, parts in fold_parts(names):
        letters, of = _LETTERS[: len(columns)], _LETTERS[len(columns)]
        made = []
        for part, own in parts.items():
            numbered = part.format(*(f"{{{letter}}}" for letter in letters))
            over = f"for {of} in {_indices(module, own[0])}" if own else ""
            made.append((_text(_with_letters(numbered, of)), over))
        loops = [
            f"for {letter} in {_indices(module, values)}"
            for letter, values in zip(letters, columns, strict=True)
        ]
        lines += _row(_text(_with_letters(tensor, letters)), made, loops)
    return (
        [f"{name} = {{", *(f"    {line}" for line in lines), "}"] if lines else [f"{name} = {{}}"]
    )


def _row(key: str, made: list[tuple[str, str]], loops: list[str]) -> list[str]:
    """A tensor and what is made of it, each perhaps for some numbers; all that for some too."""
    if len(made) == 1:
        row = _opened(f"{key}: [", list(filter(None, made[0])), "]")
    else:
        items = [_opened("*(", [text, over], "),") if over else [f"{text},"] for text, over in made]
        row = _opened(f"{key}: [", [line for item in items for line in item], "]")
    if loops:
        return _opened("**{", [*row, *loops], "},")
    return [*row[:-1], f"{row[-1]},"]


def _opened(start: str, inner: list[str], end: str) -> list[str]:
    """Brackets in one line, or where that is too long in several.

    Here and not by `wrapped`, which takes what is in brackets for a list.
    """
    one = f"{start}{' '.join(inner).removesuffix(',')}{end}"
    if len(one) <= WIDTH - 12 and "*(" not in inner:  # at most three brackets are around it
        return [one]
    return [start, *(f"    {line}" for line in inner), end]


def _with_letters(name: str, letters: str) -> str:
    """A name with `{i}` for its first star, and so on."""
    for letter in letters:
        name = name.replace("*", f"{{{letter}}}", 1)
    return name


def _text(name: str) -> str:
    """A string, with a number in it where it has braces."""
    return f"f{quoted(name)}" if "{" in name else quoted(name)


def _indices(module: Module, values: Indices) -> str:
    """The values of an index as source text."""
    if len(values) > 1:
        steps = range(values[0], values[-1] + 1, values[1] - values[0])
        if tuple(steps) == values:
            size = module.size("layers", len(values))
            return f"range({size})" if steps == range(len(values)) else repr(steps)
    return literal(values)


def _glob(pattern: str) -> str:
    """A name with `*` for anything, as a regular expression."""
    return "^" + re.escape(pattern).replace(r"\*", ".*") + "$"


def _needed(to: Destination) -> tuple[tuple[str, int], ...]:
    """The sizes that a layout's groups leave open."""
    left = (to.layout or "").partition("->")[0]
    grouped = " ".join(re.findall(r"\(([^)]*)\)", left)).split()
    return tuple((axis, n) for axis, n in to.sizes if axis in grouped)


def _raw(text: str) -> str:
    return f'r"{text}"'
