"""Whether tensors are the parameters of a model: everything that is wrong, in one error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from funcmodels.checkpoint_files import DTYPES, Stored
from funcmodels.errors import MAX_NAMES, CheckpointError
from funcmodels.spec import Model
from funcmodels.weightmap import TensorMap


def check_not_quantised(folder: Path) -> None:
    """Refuse a folder whose tensors stand for weights that they are not.

    Raises:
        CheckpointError: its config.json says that they are quantised.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if (quantization := config.get("quantization_config")) is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    raise CheckpointError(
        f"{folder} holds quantised weights",
        got=f"quantization_config of method {method!r}",
        need="floating-point weights; the engine serves the folder as it is",
        fix="load the checkpoint that it was quantised from, or one that was dequantised",
    )


def check_tensors(model: Model, stored: Mapping[str, Stored], folder: Path) -> None:
    """Refuse a checkpoint whose tensors are not the model's parameters.

    Raises:
        CheckpointError: listing tensors that are missing, unused, misshaped and mistyped.
    """
    owner = {name: path for path, map_ in model.tensor_maps.items() for name in map_.names}
    is_ignored = _matcher((*model.hf_ignored, *model.hf_tied))
    missing: dict[str, str] = {}
    for name, path in owner.items():
        if name not in stored:
            missing.setdefault(path, name)
    unused = [name for name in stored if name not in owner and not is_ignored(name)]
    shapes, types = [], []
    for name, path in owner.items():
        if name in stored:
            need = model.tensor_maps[path].tensor_shape()
            if stored[name].shape != need:
                shapes.append(name)
            if stored[name].dtype not in DTYPES:
                types.append(name)
    if not (missing or unused or shapes or types):
        return
    files = len({tensor.file for tensor in stored.values()})
    where = f"{folder}/ ({files} file{'s' if files != 1 else ''})"
    if missing:
        what = f"{len(missing)} of {len(model.by_path)} parameters have no tensor in {where}"
    elif unused:
        what = f"{len(unused)} of {len(stored)} tensors belong to no parameter, in {where}"
    elif shapes:
        what = f"{len(shapes)} of {len(stored)} tensors have another shape, in {where}"
    else:
        what = f"{len(types)} of {len(stored)} tensors are not floating-point, in {where}"
    lines = {
        "missing": _rows([f'{path} <- "{name}"' for path, name in missing.items()], [*missing])
        if missing
        else None,
        "unused": _rows([f'"{name}"' for name in unused], unused) if missing or unused else None,
        "shapes": _rows([_shape(model.tensor_maps[owner[n]], n, stored[n]) for n in shapes], shapes)
        if shapes
        else None,
        "types": _rows([f'"{n}" is {stored[n].dtype}' for n in types], types) if types else None,
    }
    raise CheckpointError(
        what,
        need=f"one of {', '.join(DTYPES)}" if types and not (missing or unused) else None,
        fix=_fix(model, stored, list(missing.values()), unused, shapes, owner),
        from_=model.by_path[next(iter(missing))].where if missing else None,
        **lines,
    )


def check_weights(model: Model, values: Mapping[str, Tensor]) -> None:
    """Refuse to save tensors that are not the model's parameters.

    Raises:
        CheckpointError: another structure, shape, or a type that is not floating-point.
    """
    missing = [path for path in model.by_path if path not in values]
    extra = [path for path in values if path not in model.by_path]
    wrong = [
        f"{path} is {_said(value)}, need {param.shape}"
        for path, param in model.by_path.items()
        if path in values
        for value in [values[path]]
        if not isinstance(value, Tensor)
        or tuple(value.shape) != param.shape
        or value.dtype not in DTYPES.values()
    ]
    if missing or extra or wrong:
        raise CheckpointError(
            f"these are not the weights of {model.name}",
            missing=_rows(missing, missing),
            extra=_rows(extra, extra),
            wrong=_rows(wrong, []) if wrong else None,
            fix="pass the pytree that fm.init or fm.load returned, or one of its structure",
        )


def _said(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _matcher(patterns: Iterable[str]):
    """Whether a name matches one of the patterns, in which `*` stands for anything."""
    regex = re.compile("|".join(".*".join(map(re.escape, p.split("*"))) for p in patterns) or r"$^")
    return regex.fullmatch


def _rows(rows: list[str], names: list[str]) -> str:
    """At most five rows, then a count, which says what the rest are where they are alike."""
    if len(rows) <= MAX_NAMES:
        return "\n".join(rows) or "none"
    kinds = sorted({_kind(name) for name in names[MAX_NAMES:]})
    alike = f", all {' or '.join(kinds)}" if names and len(kinds) <= 3 else ""
    return "\n".join([*rows[:MAX_NAMES], f"... and {len(rows) - MAX_NAMES} more{alike}"])


def _kind(name: str) -> str:
    """The last part of a name that says what a tensor is: `q_norm`, of either spelling."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _shape(map_: TensorMap, name: str, tensor: Stored) -> str:
    layout = map_.written or "a scalar"
    return f'"{name}" is {tensor.shape}, need {map_.tensor_shape()} = {layout}'


def _fix(
    model: Model,
    stored: Mapping[str, Stored],
    missing: list[str],
    unused: list[str],
    shapes: list[str],
    owner: Mapping[str, str],
) -> str:
    """The likeliest reason, computed from what does match."""
    if missing and (prefix := _prefix(missing, unused)):
        return prefix
    if missing and len(missing) == len(model.by_path):
        return f"no name matches; is this a checkpoint of {model.name}?"
    if missing:
        matching = "every other name matches" if not unused else "the other names match"
        return f"{matching} {model.name}; is this a checkpoint of it?"
    if unused:
        return f"if {model.name} can do without them: fm.Model(..., hf_ignored={_tuple(unused)})"
    if shapes:
        return _fix_shape(model.tensor_maps[owner[shapes[0]]], stored[shapes[0]].shape)
    return "load the checkpoint that this one was quantised from"


def _tuple(names: list[str]) -> str:
    kinds = [*dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)]
    return f"({', '.join(map(repr, kinds[:MAX_NAMES]))},)"


def _prefix(missing: list[str], unused: list[str]) -> str | None:
    """Whether the two sides differ by a prefix only."""
    have, want = set(unused), set(missing)
    for name in unused:
        if missing[0].endswith(f".{name}"):
            prefix = missing[0].removesuffix(name)
            if all(m.removeprefix(prefix) in have for m in missing if m.startswith(prefix)):
                return f'the names lack "{prefix}": drop it from the hf= of the parameters'
        if name.endswith(f".{missing[0]}"):
            prefix = name.removesuffix(missing[0])
            if all(prefix + m in have for m in want):
                return f'the names have "{prefix}" before them: add it to hf= of the parameters'
    return None


def _fix_shape(map_: TensorMap, got: tuple[int, ...]) -> str:
    """Which size of the config would fit, where one dim of one axis differs."""
    need, layout = map_.tensor_shape(), re.findall(r"\([^)]*\)|\w+", map_.layout)
    if got == need[::-1] and len(need) > 1:
        return f"it is stored transposed: hf='...: {' '.join(layout[::-1])}'"
    if len(got) == len(need):
        axis, have, want = next(
            (a, g, n) for a, g, n in zip(layout, got, need, strict=True) if g != n
        )
        return f"a config in which {axis} is {have} instead of {want}"
    return "check that config and weights are of the same model"
