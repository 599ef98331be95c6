"""The tensors of a checkpoint on their way to the layers: awaited, taken apart, named anew.

Copied into emitted files as it stands here; it may use the names that the file imports, and what
else is copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
from safetensors import safe_open
from torch import nn
from vllm.config import VllmConfig


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
