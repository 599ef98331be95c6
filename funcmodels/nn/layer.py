"""What the layers have in common: parameters, of which each rank holds a part."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from funcmodels.errors import ShardingError
from funcmodels.nn.ranks import Mesh, ranks_of


class ParallelLayer(nn.Module):
    """A layer whose parameters may be cut over ranks.

    `cuts` says along which dim the ranks divide a parameter; what is not in it is whole on each.
    """

    cuts: ClassVar[dict[str, int]] = {}

    def __init__(self, mesh: Mesh = None) -> None:
        super().__init__()
        self.ranks = ranks_of(mesh)

    @property
    def rank(self) -> int:
        return 0 if self.ranks is None else self.ranks.rank

    @property
    def size(self) -> int:
        """How many ranks share the layer."""
        return 1 if self.ranks is None else self.ranks.size

    def divided(self, name: str, n: int) -> int:
        """A rank's share of a size.

        Raises:
            ShardingError: the ranks do not divide it.
        """
        if n % self.size == 0:
            return n // self.size
        up = -(-n // self.size) * self.size
        raise ShardingError(
            f"{type(self).__name__}: the ranks do not divide {name}",
            got=f"{name}={n}, {self.size} ranks",
            need=f"{name} a multiple of {self.size}",
            fix=f"{name}={up}"
            + (", with rows that no token uses" if name == "num_embeddings" else ""),
        )

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        """A parameter of this whole shape, of which this rank's part is allocated."""
        local = list(shape)
        if name in self.cuts:
            local[self.cuts[name]] //= self.size
        value = torch.empty(local, dtype=dtype, device=device)
        self.register_parameter(name, nn.Parameter(value))

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole parameter: a view."""
        if self.ranks is None or name not in self.cuts:
            return whole
        return self.ranks.block(whole, self.ranks.rank, self.cuts[name], self.ranks.size)

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter on one rank alone."""
        shape = list(self.get_parameter(name).shape)
        if name in self.cuts:
            shape[self.cuts[name]] *= self.size
        return tuple(shape)

    def extra_repr(self) -> str:
        sizes = [f"{n}={self.whole_shape(n)}" for n, _ in self.named_parameters(recurse=False)]
        return ", ".join(sizes + [f"rank {self.rank} of {self.size}"] * (self.size > 1))

    @torch.no_grad()
    def draw(self, name: str, std: float) -> None:
        """Fill a parameter with normal values, the same on any number of ranks.

        The whole is drawn and this rank's part kept, so that ranks of one seed hold the parts of
        what one process would draw; parts drawn alone would be copies of each other.
        """
        param = self.get_parameter(name)
        if param.is_meta:
            return
        whole = torch.randn(self.whole_shape(name), dtype=torch.float32, device=param.device)
        param.copy_(self.part(name, whole * std))
