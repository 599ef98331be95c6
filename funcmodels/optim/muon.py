"""Muon: an orthogonalised momentum for hidden matrices, another optimiser for the rest."""

# pyright: reportPrivateImportUsage=false
# torch's fused and foreach kernels have names with an underscore; torch.optim calls them so.

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from einops import parse_shape, rearrange
from torch import Tensor

from funcmodels.errors import TrainingError
from funcmodels.optim.arguments import SHARE, SOME_STEPS, check_number, check_optimizer
from funcmodels.optim.masks import Mask, matches
from funcmodels.optim.optimizer import Hyper, Optimizer, is_transformed, optimizer_of
from funcmodels.optim.partition import partition
from funcmodels.optim.parts import parts
from funcmodels.optim.schedules import Schedule
from funcmodels.spec import Model

# Coefficients of the quintic iteration, chosen by its author for their slope at zero.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7
ADJUSTMENTS = ("original", "match_rms_adamw")


def muon(
    lr: float | Schedule,
    matrices: Mapping[str, str],
    *,
    rest: Optimizer,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    decay: Mask | None = None,
    steps: int = 5,
    adjust: Literal["original", "match_rms_adamw"] = "original",
    state_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Muon for some parameters, `rest` for the others.

    m = momentum m + (1 - momentum) g;  u = g + momentum (m - g) with Nesterov's, else m
    w = w - lr (weight_decay w + a NewtonSchulz(u)), with NewtonSchulz(U S V^T) about U V^T, in
    bfloat16, and a = sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns)) to match the
    size of AdamW's steps, so that its learning rate can be kept. Where processes hold parts of
    parameters, see `fm.optim.sharded`.

    Args:
        matrices: path, or pattern of paths with `*`, -> how the parameter is a matrix, or several
            of them on its leading dims, as an einops pattern: `"h d e -> (h d) e"`. See
            `fm.optim.matrices(model)`.
        rest: the optimiser of all other parameters: embeddings, head, norms, biases.
        steps: of the iteration.
        decay: the matrices that `weight_decay` is for; None means all.
    Returns:
        An optimiser that equals `torch.optim.Muon` bit for bit on float32 matrices on one device.
    Raises:
        TrainingError: an argument is out of its range; a pattern whose right side
            has fewer than two dims.
    Source: Jordan 2024, https://kellerjordan.github.io/posts/muon; "match_rms_adamw": Liu et al.
        2025, arXiv:2502.16982.
    """
    check_number("muon", "momentum", momentum, SHARE, fix="momentum=0.95")
    check_number("muon", "steps", steps, SOME_STEPS)
    check_optimizer("muon: rest", rest)
    if adjust not in ADJUSTMENTS:
        raise TrainingError(
            "fm.optim.muon: adjust is unknown",
            got=f"adjust={adjust!r}",
            need=" or ".join(map(repr, ADJUSTMENTS)),
            fix=f"adjust={ADJUSTMENTS[0]!r}",
        )
    for path, pattern in matrices.items():
        _check(path, pattern)

    def step(path: str, u: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor | float]:
        """The direction, of the parameter's shape, and the rate for it."""
        at = parts()
        u = u if at is None else at.whole(path, _known(u))
        matrix = to_matrix(u, _pattern(matrices, path))
        rows, columns = matrix.shape[-2:]
        if adjust == "original":
            ratio = math.sqrt(max(1, rows / columns))
        else:
            ratio = 0.2 * math.sqrt(max(rows, columns))
        direction = from_matrix(newton_schulz(matrix, steps), u, _pattern(matrices, path))
        return direction if at is None else at.part(path, direction), hyper.rate * ratio

    def rule(
        path: str, w: Tensor, g: Tensor, state: tuple[Tensor, ...], hyper: Hyper
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        m = torch.lerp(state[0], g, 1 - momentum)
        direction, rate = step(path, torch.lerp(g, m, momentum) if nesterov else m, hyper)
        w = w * (1 - hyper.rate * hyper.weight_decay) - rate * direction
        return w, (m,)

    def kernel(
        paths: list[str],
        ws: list[Tensor],
        gs: list[Tensor],
        states: tuple[list[Tensor], ...],
        hyper: Hyper,
    ) -> None:
        torch._foreach_lerp_(states[0], gs, 1 - momentum)
        # One after the other: the iteration's matrices are many times the size of a weight.
        for path, w, g, m in zip(paths, ws, gs, states[0], strict=True):
            direction, rate = step(path, torch.lerp(g, m, momentum) if nesterov else m, hyper)
            w.mul_(1 - hyper.rate * hyper.weight_decay)
            w.add_(direction, alpha=-float(rate))

    hidden = optimizer_of(
        "muon",
        ("m",),
        rule,
        kernel,
        lr=lr,
        weight_decay=weight_decay,
        decay=decay,
        state_dtype=state_dtype,
        elementwise=False,
        asks=True,
    )
    return partition({**dict.fromkeys(matrices, hidden), "*": rest})


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T for a matrix U S V^T: its singular values go to between 0.7 and 1.2.

    Args:
        matrix: (*batch, rows, columns).
    Returns:
        The same shape, in bfloat16, in which the iteration is stable.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller Gram matrix
    if x.ndim == 2:
        x = x / x.norm().clamp(min=EPS)
    else:
        x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = _add_product(x, _add_product(gram, gram, gram, b, c), x, a, 1.0)
    return x.mT if tall else x


def _add_product(add: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> Tensor:
    """beta add + alpha left @ right, a kernel for one matrix or one for many."""
    if add.ndim == 2:
        return torch.addmm(add, left, right, beta=beta, alpha=alpha)
    flat = (x.flatten(0, -3) for x in (add, left, right))
    return torch.baddbmm(*flat, beta=beta, alpha=alpha).view(add.shape)


def matrices(model: Model) -> dict[str, str]:
    """Path -> einops pattern of every hidden matrix of a model, for `muon`.

    Hidden means: in a list of layers, or stacked over layers or experts; so embeddings and the
    head are not among them. The matrix is the tensor that the checkpoint stores, [out, in], or
    several of them.

    Raises:
        TrainingError: it is no model, but a module or weights.
    """
    if not isinstance(model, Model):
        raise TrainingError(
            "fm.optim.matrices: which matrices are hidden is said by a model's declarations",
            got=f"a {type(model).__name__}",
            need="an fm.Model",
            fix=f"fm.optim.matrices({'module.model' if hasattr(model, 'model') else 'model'})",
        )
    found = {}
    for path, map_ in model.tensor_maps.items():
        hidden = map_.spread or any(part.isdigit() for part in path.split("."))
        if hidden and len(map_.tensor_shape()) == 2:
            spread = f"({' '.join(map_.spread)}) " if map_.spread else ""
            found[path] = f"{' '.join(map_.axes)} -> {spread}{map_.layout}"
    return found


def to_matrix(value: Tensor, pattern: str) -> Tensor:
    """A parameter as a matrix, or several."""
    return rearrange(value, pattern)


def from_matrix(value: Tensor, like: Tensor, pattern: str) -> Tensor:
    """The inverse, to the shape of `like`."""
    left, _, right = pattern.partition("->")
    return rearrange(value, f"{right} -> {left}", **parse_shape(like, left))


def _known(u: Tensor) -> Tensor:
    """A tensor that can be gathered: to torch.func, what comes back would be a constant."""
    if is_transformed(u):
        raise TrainingError(
            "Muon on parts of parameters cannot be differentiated or vectorised",
            got="a transform of torch.func around its update",
            need="an update outside of torch.func, or parameters that are whole",
            fix="take the step outside; or on one process",
        )
    return u


def _pattern(matrices: Mapping[str, str], path: str) -> str:
    return next(how for glob, how in matrices.items() if matches(path, glob))


def _check(path: str, pattern: str) -> None:
    right = pattern.partition("->")[2]
    groups = rearrange_groups(right)
    if groups < 2:
        raise TrainingError(
            f"{path} is not made a matrix",
            got=repr(pattern),
            need="an einops pattern with two dims or more on its right side",
            fix='"h d e -> (h d) e"; norms and biases go to `rest`',
        )


def rearrange_groups(pattern: str) -> int:
    """How many dims one side of an einops pattern has."""
    depth = count = 0
    for word in pattern.replace("(", " ( ").replace(")", " ) ").split():
        count += word == "(" or (depth == 0 and word != ")")
        depth += (word == "(") - (word == ")")
    return count
