"""How a served model loads, as text: its tables of names, its mapper and `load_weights`."""

from __future__ import annotations

from collections.abc import Mapping

from compiler.emit.scope import Module
from compiler.emit.text import WIDTH, literal, quoted, table
from compiler.fold_names import Indices, fold_parts
from compiler.loading import Loading

_LETTERS = "ijklmnop"
# What the served class needs when it is made, so that it stands above it.
HELPERS = ("AdaptersApart", "ModuleNames", "CheckpointNames")


def tensor_lines(loading: Loading, module: Module) -> list[str]:
    """The tables `TENSORS` and `LORA_TARGETS`."""
    return [
        "# Tensors of its checkpoint; a star stands for an index.",
        *_names_table(module, "TENSORS", loading.tensors),
        "",
        "# What of it adapters may change.",
        *_names_table(module, "LORA_TARGETS", loading.lora_targets),
        *_split_lines(loading, module),
        *_shared_lines(loading, module),
        *_expert_lines(loading, module),
    ]


def _split_lines(loading: Loading, module: Module) -> list[str]:
    """The tables `SPLIT` and `REPEATED`, where there is anything to take apart."""
    if not loading.split and not loading.repeated:
        return []
    return [
        "",
        "# Tensors that are stacked, and the parts that layers have.",
        *_parts_table(module, "SPLIT", loading.split),
        "",
        "# Tensors that several layers have.",
        *_parts_table(module, "REPEATED", loading.repeated),
    ]


def _expert_lines(loading: Loading, module: Module) -> list[str]:
    """The table `EXPERT_TENSORS`, where one tensor holds all experts."""
    if not loading.experts:
        return []
    module.use("re")
    rows = {f"re.compile({_raw(name)})": _raw(new) for name, new in loading.experts.items()}
    what = "# Tensors that hold all experts, and the name of each."
    return ["", what, *table("EXPERT_TENSORS", rows)]


def _shared_lines(loading: Loading, module: Module) -> list[str]:
    """The table `SHARED`, where tensors are several parameters."""
    if not loading.shared:
        return []
    module.use("re")
    what = [
        "# Tensors that hold several: the dim, the turns, the rows of a unit, if they make",
        "# a layer, and the units of each.",
    ]
    lines = ["", *what, "SHARED = {"]
    for pattern, (dim, turns, unit, is_one, parts) in loading.shared.items():
        lines.append(f"    re.compile({_raw(pattern)}): ({dim}, {turns}, {unit}, {is_one}, {{")
        lines += [f"        {_raw(name)}: {count}," for name, count in parts.items()]
        lines.append("    }),")
    return [*lines, "}"]


def mapper_lines(loading: Loading, module: Module) -> list[str]:
    """The class attribute `hf_to_vllm_mapper`."""
    for name in (*HELPERS, "spelled_out"):
        module.help(name)
    lines = ["    hf_to_vllm_mapper = CheckpointNames(", "        LORA_TARGETS,"]
    if loading.split or loading.repeated:
        lines += ["        SPLIT,", "        REPEATED,"]
    if loading.regex or loading.ignored:
        module.use("re")
        lines.append("        orig_to_new_regex={")
        for pattern in loading.ignored:
            lines.append(f"            re.compile({_raw(pattern)}): None,")
        for pattern, new in loading.regex.items():
            lines.append(f"            re.compile({_raw(pattern)}): {_raw(new)},")
        lines.append("        },")
    if loading.stacked:
        lines.append("        orig_to_new_stacked={")
        for part, (new, shard) in loading.stacked.items():
            lines.append(f"            {quoted(part)}: ({quoted(new)}, {literal(shard)}),")
        lines.append("        },")
    return [*lines, "    )"]


def load_lines(loading: Loading, module: Module) -> list[str]:
    """The method `load_weights`."""
    head = "    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:"
    module.help("note_tensors")
    module.help("check_loaded")
    module.help("read_tensors")
    tied = []
    if loading.tied:
        tied += [f"        weights = {module.help('drop_tied')}(weights, {literal(loading.tied)})"]
    if loading.head:
        arguments = f"weights, {quoted(loading.head)}, self.lm_head"
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
    if loading.prefixed:
        arguments = f"weights, {quoted(loading.prefix)}, {literal(loading.prefixed)}"
        read += [f"        weights = {module.help('with_prefix')}({arguments})"]
    elif loading.prefix:
        arguments = f"weights, {quoted(loading.prefix)}"
        read += [f"        weights = {module.help('without_prefix')}({arguments})"]
    if loading.shared:
        read += [f"        weights = {module.help('set_apart')}(weights, SHARED, self.awaited)"]
    if loading.split or loading.repeated:
        read += [f"        weights = {module.help('take_apart')}(weights, SPLIT, REPEATED)"]
    if loading.experts:
        read += [f"        weights = {module.help('each_expert')}(weights, EXPERT_TENSORS)"]
    if not loading.layouts:
        return [head, *read, *loader]
    module.use("rearrange")
    module.use("re")
    lines = [
        "    # How the checkpoint lays tensors out, and how vLLM's layers do.",
        "    layouts = {",
    ]
    for pattern, (layout, sizes) in loading.layouts.items():
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


def _raw(text: str) -> str:
    return f'r"{text}"'
