"""Hugging Face checkpoint folder <-> pytree of tensors, through the model's weight map.

Loading reads one tensor at a time into its place; saving replaces the folder at once. Only
safetensors are read: a pickle can run code, and is refused.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from funcmodels import tree
from funcmodels.atomic import recover, replacing
from funcmodels.checkpoint_check import check_not_quantised, check_tensors, check_weights
from funcmodels.checkpoint_files import DTYPES, INDEX, SINGLE, Stored, stored_tensors
from funcmodels.config_json import config_json
from funcmodels.errors import CheckpointError
from funcmodels.parts import stored_tensors_of
from funcmodels.spec import Model, Param

# Files of a folder that belong to the text side of a model, and go with its weights.
COMPANIONS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*.tiktoken",
    "*.model",
)


def load(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """The weights of a model, from a Hugging Face folder of safetensors.

    Streamed: beside the weights themselves, at most one tensor of the checkpoint is in memory.

    Args:
        folder: holds model.safetensors, or the shards that its index names.
        dtype: of every parameter that declares none of its own; None keeps the checkpoint's.
        device: where the weights go, tensor by tensor.
    Returns:
        A pytree of tensors with the structure of `model.params`.
    Raises:
        CheckpointError: no safetensors, or tensors that are missing, unused, or of another shape
            or type: all of them in one error, before anything is allocated. Or quantised ones.
    """
    folder = Path(folder)
    recover(folder)
    check_not_quantised(folder)
    stored = _as_declared(model, stored_tensors(folder))
    check_tensors(model, stored, folder)

    def read(path: str, param: Param) -> Tensor:
        map_ = model.tensor_maps[path]
        kept = functools.reduce(torch.promote_types, (DTYPES[stored[n].dtype] for n in map_.names))
        value = torch.empty(param.shape, dtype=param.dtype or dtype or kept, device=device)
        for index, name in enumerate(map_.names):
            # Opened for each tensor: a file kept open keeps all its pages in memory.
            with safe_open(stored[name].file, framework="pt") as file:
                map_.fill(value, index, file.get_tensor(stored[name].name))
        return value

    weights = tree.map_with_path(read, model.params)
    _check_tied(model, weights, stored)
    return weights


def _as_declared(model: Model, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors on disk, whether or not their names begin as the model's do."""
    return {model.declared_name(name): tensor for name, tensor in stored.items()}


def _check_tied(model: Model, weights: Any, stored: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that stores a tied parameter twice, with different values."""
    values = dict(tree.items(weights)) if model.hf_tied else {}
    for name, path in model.hf_tied.items():
        if name not in stored:
            continue
        with safe_open(stored[name].file, framework="pt") as file:
            again = file.get_tensor(stored[name].name)
        (kept,) = model.tensor_maps[path].from_param(values[path])
        if not torch.equal(again.to(kept), kept):
            raise CheckpointError(
                f'"{name}" is not the tensor that it is tied to',
                got=f"other values than {path}, in {stored[name].file}",
                need="equal tensors, or a config that does not tie them",
                from_=model.by_path[path].where,
                fix='"tie_word_embeddings": false in config.json',
            )


def save(
    model: Model,
    weights: Any,
    folder: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face folder: config.json and safetensors, in the checkpoint's layout.

    The folder is replaced at once (see `funcmodels.atomic`): killed half-way, the old one is
    intact. What else the old folder held, such as a tokenizer, is kept.

    Args:
        weights: pytree of floating-point tensors with the structure of `model.params`.
        folder: made, or replaced.
        like: a folder whose tokenizer, chat template and generation config are copied.
        max_shard_size: bytes of one file; above it the tensors are split over several.
    Raises:
        CheckpointError: the weights are not those of the model, or the folder cannot be replaced.
        ConfigError: config.json cannot be built.
    """
    values = dict(tree.items(weights))
    check_weights(model, values)
    config = config_json(model, values)
    folder = Path(folder)
    with replacing(folder) as new:
        _keep_foreign(folder, new)
        if like is not None:
            _copy_companions(Path(like), new)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weight_map = write_tensors(model, values, new, max_shard_size)
        for file in set(weight_map.values()):
            shutil.copymode(new / "config.json", new / file)  # safetensors makes it private
        if SINGLE not in weight_map.values():
            index = {"metadata": {"total_size": _bytes(model, values)}, "weight_map": weight_map}
            (new / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(
    model: Model, values: Mapping[str, Tensor], folder: Path, max_shard_size: int
) -> dict[str, str]:
    """Write the checkpoint's tensors as safetensors; returns the file of each, in tree order.

    Beside the parameters, at most `max_shard_size` bytes of them are in memory a second time.
    """
    shards = _shards(model, values, max_shard_size)
    for file, names in shards.items():
        save_file(dict(_tensors(model, values, names)), folder / file, metadata={"format": "pt"})
    return {name: file for file, names in shards.items() for name in names}


def _shards(
    model: Model, values: Mapping[str, Tensor], max_shard_size: int
) -> dict[str, list[str]]:
    """File name -> the tensors in it, in the tree's order."""
    sizes: dict[str, int] = {}
    for path, map_ in model.tensor_maps.items():
        size = values[path].numel() * values[path].element_size() // len(map_.names)
        for name in map_.names:
            sizes[name] = sizes.get(name, 0) + size
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    of = len(shards)
    return {f"model-{i:05}-of-{of:05}.safetensors": names for i, names in enumerate(shards, 1)}


def _tensors(
    model: Model, values: Mapping[str, Tensor], names: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one shard, contiguous and on the CPU; a copy only where one is needed."""
    seen: set[int] = set()
    for name, tensor in stored_tensors_of(model.tensor_maps, values, set(names)):
        tensor = tensor.cpu().contiguous()
        # One tensor given for two parameters: safetensors stores no aliases.
        yield name, tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())


def _bytes(model: Model, values: Mapping[str, Tensor]) -> int:
    return sum(values[path].numel() * values[path].element_size() for path in model.by_path)


def _is_ours(name: str) -> bool:
    """Whether a file of the old folder is one that saving writes anew."""
    return name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json"))


def _keep_foreign(old: Path, new: Path) -> None:
    """Carry over what is not ours, by hard links where the file system has them."""
    if not old.is_dir():
        return
    for path in old.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        elif not _is_ours(path.name):
            _link(path, new / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _copy_companions(source: Path, new: Path) -> None:
    for path in {path for pattern in COMPANIONS for path in source.glob(pattern)}:
        if path.is_file():
            (new / path.name).unlink(missing_ok=True)  # it may be a link into the old folder
            shutil.copy2(path, new / path.name)
