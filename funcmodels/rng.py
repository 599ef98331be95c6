"""The states of all random generators, as tensors: what a resumed run draws, the whole one drew."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rng_state() -> dict[str, Tensor]:
    """The generators of torch (CPU and current CUDA device), of NumPy and of Python.

    Returns:
        uint8 and int64 tensors on the CPU, whose shapes depend on the machine alone.
    """
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = legacy
    assert (version, name) == (3, "MT19937"), "another generator of Python or NumPy"
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([*words, gauss is not None, _bits(gauss or 0.0)]),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss, _bits(cached)]),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    *words, has_gauss, gauss = state["python"].tolist()
    random.setstate((3, tuple(words), _number(gauss) if has_gauss else None))
    *keys, position, has_cached, cached = state["numpy"].tolist()
    array: Any = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", array, position, has_cached, _number(cached)))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _bits(number: float) -> int:
    """A float64 as an integer of the same bits."""
    return int(np.float64(number).view(np.int64))


def _number(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
