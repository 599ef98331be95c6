"""One training checkpoint by torch.distributed.checkpoint: safetensors, whole or not at all.

DCP plans which process writes which part of which tensor. Its own file format is pickle; this
uses its safetensors format instead, in which each file's header says where its parts belong. The
folder is written aside, flushed, given a list of its files, and put in its place by one rename.

On disk there is no pickle. The plans that processes exchange while they save and load are pickled
by DCP, over the process group of the job itself.
"""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult

from funcmodels.atomic import sync
from funcmodels.training_places import LoadPlanner, Places, SavePlanner

# What a whole checkpoint holds beside its tensors; written last.
CONTENTS = "training.json"
FORMAT = 1
# Bytes of one file: a process has that much of its tensors in memory twice while it writes.
MAX_FILE = 1 << 30


class Writer(HuggingFaceStorageWriter):
    """Writes the folder `final`, which does not exist until every process has written its part."""

    def __init__(self, final: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        self.final = final
        self.aside = final.with_name(f".{final.name}.saving")
        self.about = about
        super().__init__(str(self.aside), fqn_to_index_mapping=_files(state), save_distributed=True)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Clears what a killed process has left; others write only after they heard of the plan."""
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            shutil.rmtree(self.aside, ignore_errors=True)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Runs in one process, when all have written; the rename makes the checkpoint exist."""
        files = sorted(self.aside.glob("*.safetensors"))
        contents = {
            "format": FORMAT,
            "files": {file.name: file.stat().st_size for file in files},
            "about": self.about,
        }
        (self.aside / CONTENTS).write_text(json.dumps(contents, indent=1) + "\n")
        for path in (*files, self.aside / CONTENTS, self.aside):
            sync(path)
        if self.final.exists():  # saved again, as after going back to an earlier step
            remove(self.final)
        self.aside.rename(self.final)
        sync(self.final.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that half of one is never found under its name."""
    away = folder.with_name(f".{folder.name}.deleting")
    shutil.rmtree(away, ignore_errors=True)
    folder.rename(away)
    shutil.rmtree(away)


def sweep(folder: Path) -> None:
    """Delete what killed processes have left half-written, or half-deleted."""
    for kind in ("saving", "deleting"):
        for path in folder.glob(f".step-*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


def contents_of(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None where it is not whole."""
    try:
        contents = json.loads((folder / CONTENTS).read_text())
        whole = contents["format"] == FORMAT and all(
            (folder / file).stat().st_size == size for file, size in contents["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return contents if whole else None


def stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and parts of every tensor, from the headers of the files."""
    found: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return found


def is_covered(tensor: TensorStorageMetadata) -> bool:
    """Whether the parts of a tensor make all of it."""
    return sum(prod(chunk.sizes) for chunk in tensor.chunks) == prod(tensor.size)


def start_save(writer: Writer, state: Mapping[str, Tensor], places: Places, group: Any) -> Any:
    """Copies the tensors to the CPU, and then writes them in a thread; returns its future."""
    _quiet()
    response = async_save(
        dict(state), storage_writer=writer, planner=SavePlanner(places), process_group=group
    )
    return getattr(response, "upload_completion", response)


def read_into(folder: Path, state: Mapping[str, Tensor], places: Places, group: Any) -> None:
    """Fill tensors in place, each process with the parts that it holds."""
    _quiet()
    reader = HuggingFaceStorageReader(str(folder))
    load(dict(state), storage_reader=reader, planner=LoadPlanner(places), process_group=group)


def _files(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file of each tensor, from 1."""
    numbers, number, used = {}, 1, 0
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if used and used + size > MAX_FILE:
            number, used = number + 1, 0
        numbers[name], used = number, used + size
    return numbers


_once = threading.Lock()


def _quiet() -> None:
    """DCP warns in one process that there is only one; said from a thread, so filtered for all."""
    if _once.acquire(blocking=False):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch")
