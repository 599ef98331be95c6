"""What sentence-transformers writes beside config.json: how a sequence becomes one vector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from funcmodels.errors import ConfigError, listed

# Fields of a Pooling module's config.json that are set, and our name of what they ask for.
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


def pooling_of(folder: Path) -> dict[str, Any]:
    """`pooling` and `normalize` of a folder with a modules.json; nothing of another.

    Raises:
        ConfigError: a module beside the encoder, one pooling and normalisation; a pooling that
            `fm.Model` has not, or several.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return {}
    modules = {m["type"].rpartition(".")[2]: m["path"] for m in json.loads(path.read_text())}
    if unknown := [name for name in modules if name not in ("Transformer", "Pooling", "Normalize")]:
        raise ConfigError(
            f"{path} asks for more than an encoder and a pooling",
            got=listed(unknown),
            need="Transformer, Pooling, and possibly Normalize",
            fix="write a model file whose forward computes it",
        )
    if "Pooling" not in modules:
        raise ConfigError(
            f"{path} does not say how a sequence becomes one vector",
            got=listed(modules),
            need="a Pooling module",
            fix='"pooling": "mean" in config.json, without modules.json',
        )
    settings = json.loads((folder / modules["Pooling"] / "config.json").read_text())
    asked = [k for k, v in settings.items() if k.startswith("pooling_mode_") and v]
    asked += [settings["pooling_mode"]] if "pooling_mode" in settings else []
    found = [_MODES.get(mode, mode) for mode in asked]
    if len(found) != 1 or found[0] not in _MODES.values():
        raise ConfigError(
            f"{modules['Pooling']}/config.json asks for a pooling that is not supported",
            got=listed(asked) if asked else "none",
            need=f"one of {', '.join(_MODES)}",
            fix="write a model file whose forward computes it",
        )
    return {"pooling": found[0], "normalize": "Normalize" in modules}
