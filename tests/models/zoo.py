"""The table of zoo models that the tests go through: a row is a file in tests/models/rows.

To add a model, add `tests/models/rows/NAME.py` with a `ROW`, and edit nothing else: the rows are
found by listing the folder, for the tests without the engine (tests/models/test_zoo.py) and with it
(tests/engine/test_zoo.py).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import funcmodels as fm
from tests.tiny_llama import weights_of

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """A published config.json, and how many parameters the checkpoint has.

    Args:
        config: its fields; those that name tokens, versions and dtypes may be left out.
        parameters: as published; tied tables count once.
    """

    config: Fields
    parameters: int


@dataclass(frozen=True)
class Row:
    """One architecture of the zoo, and what it is tested with.

    Args:
        module: its file in funcmodels/models.
        architecture: the name in config.json's `architectures`, which is transformers' class.
        hf: config.json of a tiny one that the engine can serve, too: heads of 32, sizes that two
            ranks divide, a window below 40, and rather 2 layers than 4.
        variations: name -> changed fields: what its config allows.
        published: name -> real configs, of two sizes at least.
        faults: name -> fields that are changed on our side alone: each must be seen by the
            comparison with transformers. Take one for each thing that is special to the model.
        served: the variations that the engine serves, too; hf itself always is.
        vllm: "module:Class" of vLLM's own class, in vllm.model_executor.models; None has none that
            works on a CPU, and says why in `no_vllm`.
        narrow_vllm: the same, of a class that takes bfloat16 alone.
        layer: the function of the file that is called once a layer; "" for none.
        linears: a pattern of the checkpoint's names of matrices that an adapter changes; or
            `no_adapters` says why there can be none.
        unquantised: a pattern of those that a checkpoint in int8 leaves as they are, beside a
            vocabulary's and a classifier's; or `no_int8` says why there is no such test.
        is_transposed: whether the checkpoint has matrices as [in, out].
        peer: the attention of transformers' model.
        amend: makes that model compute what its authors' does, where it does not.
        embeddings_first: whether the first of its hidden states are the embeddings.
        scale: of the weights: see `weights_of`.
        engine_fault: a pattern and its replacement in the emitted source, that must be seen.
        tolerance: of log probabilities from vLLM's own class, where its kernels differ from ours.
        settings: of the engine, beside the usual ones.
        no_choice: fields that let a router choose all experts: in bfloat16, rounding turns a choice
            now and then, of transformers as of ours, and no tolerance says by how much.
    """

    module: str
    architecture: str
    hf: Fields
    variations: Mapping[str, Fields]
    published: Mapping[str, Published]
    faults: Mapping[str, Fields]
    served: tuple[str, ...] = ()
    vllm: str | None = None
    no_vllm: str = ""
    narrow_vllm: str | None = None
    layer: str = "decoder_layer"
    linears: str = ""
    no_adapters: str = ""
    unquantised: str = ""
    no_int8: str = ""
    is_transposed: bool = False
    peer: str = "eager"
    amend: Callable[[Any], None] = lambda peer: None
    embeddings_first: bool = True
    scale: float = 1.3
    engine_fault: tuple[str, str] = (r"\bscale=([^,]+),", r"scale=1.1 * (\1),")
    tolerance: float = 3e-5
    settings: Fields = field(default_factory=dict)
    no_choice: Fields = field(default_factory=dict)

    @property
    def zoo(self) -> ModuleType:
        """The model's module."""
        return importlib.import_module(f"funcmodels.models.{self.module}")

    def fields(self, variation: str = "", **changes: Any) -> dict[str, Any]:
        """config.json of a variation; None is null."""
        return {**self.hf, **(self.variations[variation] if variation else {}), **changes}

    def model(self, variation: str = "", **changes: Any) -> fm.Model:
        """The tiny model of a variation."""
        return self.zoo.model(self.zoo.Config.from_hf(self.fields(variation, **changes)))

    def weights(self, model: fm.Model, dtype: torch.dtype = torch.float32) -> Any:
        """Weights that leave no logit near zero, and no norm or bias at its initial value."""
        return weights_of(model, dtype, scale=self.scale)


@functools.cache
def rows() -> dict[str, Row]:
    """Every row by the name of its file."""
    files = sorted((Path(__file__).parent / "rows").glob("*.py"))
    names = [file.stem for file in files]
    return {name: importlib.import_module(f"tests.models.rows.{name}").ROW for name in names}
