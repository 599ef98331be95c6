"""The two ends of a language model, cut along the vocabulary."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from compiler import loss_over_ranks
from funcmodels import ops
from funcmodels.nn.layer import ParallelLayer
from funcmodels.nn.ranks import Mesh, vary_over
from funcmodels.ops.loss import check_options, check_shapes


class _Table(ParallelLayer):
    """A matrix with a row for each token of the vocabulary."""

    cuts: ClassVar[dict[str, int]] = {"weight": 0}

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mesh: Mesh = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(mesh)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.divided("num_embeddings", num_embeddings)
        self.declare("weight", (num_embeddings, embedding_dim), dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.draw("weight", self.embedding_dim**-0.5)


class VocabParallelEmbedding(_Table):
    """The rows of a table, each rank with some of them: y = table[tokens].

    Rows are drawn as normal values of standard deviation embedding_dim**-0.5.

    Args:
        num_embeddings: the size of the vocabulary.
        embedding_dim: of a row.
        mesh: a DeviceMesh with a dim "tp", or a process group, that divides num_embeddings.
        dtype, device: of the table; "meta" allocates nothing.
    Shapes:
        tokens (...), integers in [0, num_embeddings), the same on all ranks ->
        (..., embedding_dim), the same on all ranks. Weight (num_embeddings / ranks, embedding_dim).
    Raises:
        ShardingError: the ranks do not divide num_embeddings, or the mesh has no dim "tp".
        IndexError: from forward on the CPU, an id that is none of the vocabulary's.
    Source: Shoeybi et al. 2019, arXiv:1909.08053.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        if self.ranks is None:
            return ops.embed(tokens, self.weight)
        rows = self.weight.shape[0]
        place = tokens - self.rank * rows
        here = (place >= 0) & (place < rows)
        known = (tokens >= 0) & (tokens < self.num_embeddings)
        # What other ranks hold reads row 0 here. An id that none holds stays out of range, and so
        # fails on all of them as it would on one process.
        row = torch.where(here, place, torch.where(known, 0, tokens))
        own = torch.where(here[..., None], ops.embed(row, self.weight), 0)
        (y,) = self.ranks.call("all_reduce", [own])
        return y


class ParallelLMHead(_Table):
    """Logits over the vocabulary, each rank with some of them: y = x @ tableᵀ.

    Weights are drawn as normal values of standard deviation embedding_dim**-0.5. To tie it to an
    embedding: `head.weight = embedding.weight`.

    Args:
        num_embeddings: the size of the vocabulary.
        embedding_dim: of x.
        mesh: a DeviceMesh with a dim "tp", or a process group, that divides num_embeddings.
        dtype, device: of the table; "meta" allocates nothing.
    Shapes:
        x (..., embedding_dim), the same on all ranks -> (..., num_embeddings), the same on all
        ranks. Weight (num_embeddings / ranks, embedding_dim).
    Raises:
        ShardingError: the ranks do not divide num_embeddings, or the mesh has no dim "tp".
    """

    def forward(self, x: Tensor) -> Tensor:
        y = ops.unembed(vary_over(self.ranks, x), self.weight)
        if self.ranks is None:
            return y
        (y,) = self.ranks.call("all_gather", [y], y.ndim - 1, self.ranks.size)
        return y

    def cross_entropy(
        self,
        x: Tensor,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        chunk: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """`ops.cross_entropy` of the logits, which no rank ever holds whole.

        Each works on its part of the vocabulary, a chunk of tokens at a time, and what is sent is
        three numbers a token.

        Args:
            x: (*batch, seq, embedding_dim), the same on all ranks.
            targets: (*batch, seq) ids.
            mask, reduction, chunk, label_smoothing, z_loss: see `ops.cross_entropy`.
        Returns:
            A scalar, or (*batch, seq) for "none"; the same on all ranks.
        """
        options = {"chunk": chunk, "label_smoothing": label_smoothing, "z_loss": z_loss}
        if self.ranks is None:
            return ops.cross_entropy(
                x, self.weight, targets, mask=mask, reduction=reduction, **options
            )
        check_shapes(x, self.weight, targets, mask)
        check_options(reduction, chunk, label_smoothing, None)
        call = (x, self.weight, targets), {"mask": mask, **options}
        (each,) = loss_over_ranks.cross_entropy(self.ranks, [call])
        if reduction == "none":
            return each
        if reduction == "sum":
            return each.sum()
        count = each.new_tensor(each.numel()) if mask is None else mask.to(each.dtype).sum()
        return each.sum() / torch.where(count == 0, 1, count)
