"""Where training is in its data, so that a resumed run goes on with the next batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from torch import Tensor

from funcmodels import tree
from funcmodels.errors import TrainingError

# An iterable of batches, gone through again at its end, or a function of the batch's number.
Data: TypeAlias = Iterable[Any] | Callable[[int], Any]


class Source:
    """The batches of a run, in order.

    A function is asked for batch 0, 1, ...; that is the surest way to resume. What has
    `state_dict` and `load_state_dict`, such as torchdata's loaders, is asked where it is. Anything
    else is begun anew, and the batches that were already used are drawn and dropped.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.position = 0  # batches taken
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Any:
        """The next batch."""
        batch = self.data(self.position) if callable(self.data) else self._advance()
        self.position += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Where it is, as JSON can hold it."""
        own = self.data.state_dict() if self._knows_where else None  # type: ignore[union-attr]
        return {"position": self.position, "own": own}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` says."""
        if callable(self.data):
            self.position = state["position"]
        elif state["own"] is not None and self._knows_where:
            self.data.load_state_dict(state["own"])  # type: ignore[union-attr]
            self.position = state["position"]
        else:
            while self.position < state["position"]:
                self.next()

    @property
    def _knows_where(self) -> bool:
        return hasattr(self.data, "state_dict") and hasattr(self.data, "load_state_dict")

    def _advance(self) -> Any:
        """The next of an iterable, from its beginning again at its end."""
        assert not callable(self.data)
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self.data)
            for batch in self._iterator:
                return batch
            self._iterator = None
        raise TrainingError(
            f"the data ended after {self.position} batches",
            need="an iterable that can be gone through again, or one without end",
            fix="a list of batches, or a function of the batch's number",
        )


def to_device(batch: Any, device: Any) -> Any:
    """The batch with its tensors on a device."""
    return tree.map(
        lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, batch
    )


def num_tokens(batch: Any) -> int:
    """The tokens of a batch as `fm.pack` makes it; 0 where it is something else."""
    tokens = batch.get("tokens") if isinstance(batch, dict) else None
    return tokens.numel() if isinstance(tokens, Tensor) else 0
