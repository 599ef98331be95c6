"""Which tensors a checkpoint folder holds: read from the headers of its safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from funcmodels.errors import CheckpointError, listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The types of safetensors that parameters may be stored in.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Stored:
    """One tensor on disk: its file, shape and safetensors type, "F32", and its name there."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    name: str


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by name, without reading one.

    Raises:
        CheckpointError: no safetensors, files that the index names and the folder lacks, both an
            index and a single file, or a file that is damaged.
    """
    stored: dict[str, Stored] = {}
    weight_map = _weight_map(folder)
    for file in _files(folder, weight_map):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    if name in stored and weight_map.get(name) != file.name:
                        continue  # a tensor in two shards: the index says which counts
                    tensor = opened.get_slice(name)
                    shape = tuple(tensor.get_shape())
                    stored[name] = Stored(file, shape, tensor.get_dtype(), name)
        except SafetensorError as error:
            raise _damaged(file, error) from error
    return stored


def _files(folder: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The safetensors files that make up a checkpoint."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder" if folder.exists() else f"{folder} does not exist",
            need="a Hugging Face checkpoint folder",
            fix="pass the folder that holds config.json and the .safetensors files",
        )
    found = sorted(folder.glob("*.safetensors"))
    single = folder / SINGLE
    if weight_map:
        names = sorted({*weight_map.values()})
        if single in found and names != [SINGLE]:
            raise CheckpointError(
                f"{folder} holds both {SINGLE} and an index of other files",
                need="one of the two: readers disagree on which counts",
                fix=f"delete {SINGLE}, or {INDEX} and its shards",
            )
        if missing := [name for name in names if folder / name not in found]:
            raise CheckpointError(
                f"{len(missing)} of {len(names)} files of {folder} are missing",
                got=f"an index that names {listed(missing)}",
                need="every file that the index names, in the same folder",
                fix="download or copy the folder again",
            )
        return [folder / name for name in names]
    if single in found:
        return [single]
    if len(found) == 1:
        return found
    raise _nothing_to_read(folder, found)


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index; empty without one."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    weight_map = json.loads(path.read_text()).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{path} holds no weight_map",
            need='{"weight_map": {tensor name: file name}}',
            fix="download or copy the folder again",
        )
    return weight_map


def _nothing_to_read(folder: Path, found: list[Path]) -> CheckpointError:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if found:
        return CheckpointError(
            f"{folder} holds {len(found)} safetensors files and no index",
            got=listed(path.name for path in found),
            need=f"{SINGLE}, or {INDEX} naming the shards",
            fix=f"keep one file, named {SINGLE}",
        )
    if pickles:
        return CheckpointError(
            f"{folder} holds pickled weights only",
            got=listed(pickles),
            need=".safetensors files: unpickling can run code, so it is never done here",
            fix="convert it, in a place where you trust it: transformers' "
            'AutoModelForCausalLM.from_pretrained(folder).save_pretrained("converted/")',
        )
    return CheckpointError(
        f"{folder} holds no weights",
        got=f"files {listed(sorted(p.name for p in folder.iterdir()))}",
        need=f"{SINGLE}, or {INDEX} and its shards",
        fix="pass the folder that holds the .safetensors files",
    )


def _damaged(file: Path, error: Exception) -> CheckpointError:
    with file.open("rb") as opened:
        is_pointer = opened.read(24).startswith(b"version https://git-lfs")
    return CheckpointError(
        f"{file} cannot be read",
        got="a Git LFS pointer" if is_pointer else str(error),
        need="a whole safetensors file",
        fix="git lfs pull" if is_pointer else "download or copy it again",
    )
