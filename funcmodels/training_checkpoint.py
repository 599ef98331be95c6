"""Training checkpoints: trees of tensors by step, sharded, in the background, whole or not there.

    folder/step-00000200/training.json                          written last: what is here, and of
    folder/step-00000200/shard-00001-model-00001-of-00001.safetensors          what size
    folder/.step-00000300.saving/                               half-written, never read

See docs/design for the format and what happens when a process is killed.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funcmodels import training_storage as storage
from funcmodels import tree
from funcmodels.errors import CheckpointError, listed
from funcmodels.spec import Model
from funcmodels.training_places import Places

_STEP = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints in a folder.

    In a job of several processes each makes one of these, with the same arguments, and calls the
    same methods in the same order; the folder is one that all of them see. Tensors that are
    DTensors are stored in parts, and can be loaded on any other mesh.

    Args:
        folder: made when something is saved.
        keep: the number of checkpoints to keep; older ones are deleted when a newer one is whole.
        background: write in a thread, while training goes on; else `save` returns when the
            checkpoint is on disk.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep: int = 3, background: bool = True
    ) -> None:
        if keep < 1:
            raise CheckpointError(
                "no checkpoint would be kept", got=f"keep={keep}", need="at least 1", fix="keep=1"
            )
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.background = background
        self._pending: Future[Any] | None = None

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, from the oldest."""
        if not self.folder.is_dir():
            return []
        found = []
        for path in self.folder.iterdir():
            if match := _STEP.fullmatch(path.name):
                if storage.contents_of(path) is not None:
                    found.append(int(match[1]))
                elif path.exists():  # else a run beside us has just deleted it
                    # Renamed only when whole, so somebody else has cut it: a copy, a full disk.
                    warnings.warn(f"{path} is not whole, and is passed over", stacklevel=2)
        return sorted(found)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return max(self.steps(), default=None)

    def about(self, step: int) -> dict[str, Any]:
        """What was said of a checkpoint when it was saved."""
        return self._contents(step)["about"]

    def save(
        self,
        step: int,
        trees: Mapping[str, Any],
        about: Mapping[str, Any],
        places: Places | None = None,
    ) -> None:
        """Save trees of tensors. When this returns, the tensors may be overwritten.

        Args:
            step: names the checkpoint; one of the same step is replaced.
            trees: name -> pytree of tensors.
            about: what to keep beside them, as JSON can hold it.
            places: "name.path" -> where a tensor of this process lies in the whole one.
        Raises:
            CheckpointError: `about` is no JSON, or two tensors have one path; also what went
                wrong with the checkpoint before this one, in the background.
        """
        self.wait()
        state = {path: _whole(value) for path, value in _by_path(trees).items()}
        _check_json(about)
        self.folder.mkdir(parents=True, exist_ok=True)
        writer = storage.Writer(self._path(step), state, dict(about))
        self._pending = storage.start_save(writer, _own_storage(state), places or {}, _group())
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Wait until what was saved is on disk, and older checkpoints than `keep` are deleted."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.result()
        if not dist.is_initialized() or dist.get_rank() == 0:
            for step in self.steps()[: -self.keep]:
                storage.remove(self._path(step))
            storage.sweep(self.folder)  # every process has written: what lies there is a dead one's

    def load(self, step: int, trees: Mapping[str, Any], places: Places | None = None) -> None:
        """Fill trees of tensors in place with what was saved under the same names.

        Args:
            places: as of `save`; those of the mesh that loads, whatever mesh has saved.
        Raises:
            CheckpointError: no such checkpoint, or one whose tensors have other names, shapes or
                dtypes; nothing is written then.
        """
        self._contents(step)
        state = _by_path(trees)
        shapes = {name: tuple(_whole(value).shape) for name, value in state.items()}
        shapes |= {
            name: tuple(place.shape) for name, place in (places or {}).items() if place.shape
        }
        _check(state, shapes, storage.stored(self._path(step)), set(trees), self._path(step))
        state = {name: _whole(value) for name, value in state.items()}
        storage.read_into(self._path(step), state, places or {}, _group())

    def shapes(self, step: int, name: str) -> dict[str, torch.Size]:
        """The shape of every tensor saved in the tree `name`, by its path there."""
        self._contents(step)
        there = storage.stored(self._path(step))
        return {
            path.removeprefix(f"{name}."): torch.Size(tensor.size)
            for path, tensor in there.items()
            if path.startswith(f"{name}.")
        }

    def load_weights(self, model: Model, step: int | None = None) -> Any:
        """The weights alone, whole and on the CPU: for `fm.save`, or to start something new.

            fm.save(model, fm.Checkpoints("out/run").load_weights(model), "out/model")

        Args:
            step: None for the newest.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(
                f"no checkpoint in {self.folder}", need="one that was saved to its end"
            )
        self._contents(step)
        dtypes = {name: t.properties.dtype for name, t in storage.stored(self._path(step)).items()}
        weights = tree.map_with_path(
            lambda path, p: torch.empty(p.shape, dtype=dtypes.get(f"weights.{path}", p.dtype)),
            model.params,
        )
        self.load(step, {"weights": weights})
        return weights

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _contents(self, step: int) -> dict[str, Any]:
        contents = storage.contents_of(self._path(step))
        if contents is None:
            raise CheckpointError(
                f"no whole checkpoint of step {step} in {self.folder}",
                got=f"those of steps {listed(map(str, self.steps()))}",
                fix="checkpoints.latest()",
            )
        return contents


def _by_path(trees: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor under its tree's name and its path."""
    found: dict[str, Tensor] = {}
    for path, value in tree.items(dict(trees)):
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} is no tensor", got=type(value).__name__, fix="put it into `about`"
            )
        if path in found:
            raise CheckpointError(
                f'two tensors have the path "{path}"',
                need="keys without dots, where they would spell another's path",
            )
        found[path] = value.detach()
    return found


def _whole(value: Tensor) -> Tensor:
    """With one dim at least: safetensors reads no slices of a scalar."""
    return value.view(1) if value.ndim == 0 else value


def _own_storage(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors none of which is another: safetensors stores no aliases."""
    seen: set[int] = set()
    own = {}
    for path, value in state.items():
        local = getattr(value, "_local_tensor", value)
        own[path] = value.clone() if local.data_ptr() in seen else value
        seen.add(local.data_ptr())
    return own


def _group() -> Any:
    """A process group for checkpoints: their messages must not mix with those of training."""
    return _group_beside(dist.group.WORLD) if dist.is_initialized() else None


@functools.cache
def _group_beside(world: Any) -> Any:
    """Made once for each set of processes, and on the CPU, as a thread's messages must be."""
    return dist.new_group(backend="gloo")


def _check(
    state: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, Any],
    names: set[str],
    path: Path,
) -> None:
    """Names, shapes and dtypes are those of the checkpoint."""
    there = {name for name in stored if name.split(".")[0] in names}
    if missing := [name for name in state if name not in there]:
        raise CheckpointError(
            f"{len(missing)} of {len(state)} tensors are not in {path}",
            missing=listed(missing),
            unused=listed(sorted(there - set(state))),
            fix="resume with the model and the optimiser that were saved",
        )
    if unused := sorted(there - set(state)):
        raise CheckpointError(
            f"{path} holds {len(unused)} tensors that are not asked for",
            unused=listed(unused),
            fix="resume with the model and the optimiser that were saved",
        )
    for name, value in state.items():
        have, shape = stored[name], shapes[name]
        if tuple(have.size) != shape or have.properties.dtype != value.dtype:
            raise CheckpointError(
                f"{name} is another tensor in {path}",
                got=f"{tuple(have.size)} {have.properties.dtype}",
                need=f"{shape} {value.dtype}",
            )
        if not storage.is_covered(have):
            raise CheckpointError(
                f"parts of {name} are missing in {path}", fix="resume from an earlier step"
            )


def _check_json(about: Mapping[str, Any]) -> None:
    try:
        same = json.loads(json.dumps(about)) == about
    except (TypeError, ValueError):
        same = False
    if not same:
        raise CheckpointError(
            "what is kept beside the tensors is not what JSON can hold",
            got=f"{dict(about)!r:.200}",
            need="dicts with text as keys, lists, text, numbers, true, false and null",
            fix="put tensors into the trees; nothing is pickled",
        )
