"""`ops.einsum` is einops' einsum: values, derivatives of every kind, and what is traced."""

from __future__ import annotations

import einops
import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from funcmodels.ops import einsum
from funcmodels.ops.einsum import einsum_of_letters

# Pattern, the operands' shapes, and whether it is a product by a matrix.
PATTERNS = [
    ("... e, h d e -> ... h d", (2, 5, 6), (3, 4, 6), True),
    ("... e, h d e -> ... h d", (6,), (3, 4, 6), True),
    ("... h d, e h d -> ... e", (2, 5, 3, 4), (6, 3, 4), True),
    ("... e, f e -> ... f", (5, 6), (7, 6), True),
    ("... e, e f -> ... f", (5, 6), (6, 7), True),
    ("... e, e h d -> ... h d", (2, 5, 6), (6, 3, 4), True),
    ("... h d, h d e -> ... e", (2, 3, 4), (3, 4, 6), True),
    ("b s e, f e -> b s f", (2, 5, 6), (7, 6), True),
    ("... e, e -> ...", (2, 5, 6), (6,), False),
    ("... e, h d e -> ... d h", (2, 5, 6), (3, 4, 6), False),
    ("... e, h d e -> h d ...", (2, 5, 6), (3, 4, 6), False),
    ("... h d, e d h -> ... e", (2, 3, 4), (6, 4, 3), False),
    ("... h d, h d -> ... h", (2, 3, 4), (3, 4), False),
    ("... h e, h d e -> ... h d", (2, 3, 6), (3, 4, 6), False),
    ("... e, h e d -> ... h d", (2, 5, 6), (3, 6, 4), False),
    ("... e f, f -> ... e", (2, 5, 6), (6,), False),
    ("... t, ... t -> ...", (2, 6), (2, 6), False),
    ("... e f, g f -> ... g", (5, 2, 6), (7, 6), False),
]
IDS = [f"{pattern} of {len(x)} dims" for pattern, x, _, _ in PATTERNS]


class Products(TorchDispatchMode):
    """What multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("mm", "bmm", "addmm", "mv", "mul", "clone", "copy_"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def operands(x: tuple[int, ...], w: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in (x, w))


@pytest.mark.parametrize(("pattern", "x", "w", "is_product"), PATTERNS, ids=IDS)
def test_values_and_derivatives(pattern, x, w, is_product):
    x, w = operands(x, w)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return einsum(x, w, pattern)

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return einops.einsum(x, w, pattern)

    def same(transform) -> None:
        torch.testing.assert_close(transform(ours), transform(theirs))

    other = tuple(torch.randn_like(t) for t in (x, w))
    same(lambda f: f(x, w))
    same(lambda f: jvp(f, (x, w), other)[1])
    same(lambda f: vjp(f, x, w)[1](f(x, w).cos()))
    same(lambda f: jacrev(grad(lambda w: f(x, w).sin().sum()))(w))
    same(lambda f: jvp(grad(lambda x, w: f(x, w).sin().sum(), (0, 1)), (x, w), other)[1])
    twice = torch.stack([x, 2 * x]), torch.stack([w, 3 * w])
    for dims in ((0, 0), (0, None), (None, 0)):
        given = [t if d == 0 else s for t, s, d in zip(twice, (x, w), dims, strict=True)]
        same(lambda f, dims=dims, given=given: vmap(f, dims)(*given))
        of_each = [t if d == 0 else s for t, s, d in zip(twice, (x, w), dims, strict=True)]
        same(
            lambda f, dims=dims, of_each=of_each: vmap(
                grad(lambda x, w: f(x, w).sin().sum(), (0, 1)), dims
            )(*of_each)
        )
    with Products() as seen:
        ours(x, w)
    assert ("bmm" not in seen.seen and "mul" not in seen.seen) or not is_product


@pytest.mark.parametrize(("pattern", "x", "w", "is_product"), PATTERNS, ids=IDS)
def test_in_torchs_letters(pattern, x, w, is_product):
    x, w = operands(x, w)
    equation = pattern.replace(" ", "")
    with Products() as seen:
        found = einsum_of_letters(equation, x, w)
    torch.testing.assert_close(found, torch.einsum(equation, x, w))
    assert ("bmm" not in seen.seen and "mul" not in seen.seen) or not is_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(dtype):
    """As near to float64 as einsum is, whose order of sums is its own."""
    x, w = operands((2, 33, 48), (3, 8, 48))
    want = einops.einsum(x, w, "... e, h d e -> ... h d")
    x, w = x.to(dtype), w.to(dtype)
    errors = [
        (f(x, w, "... e, h d e -> ... h d").double() - want).abs().max()
        for f in (einsum, einops.einsum)
    ]
    assert einsum(x, w, "... e, h d e -> ... h d").dtype == dtype
    assert errors[0] <= 1.5 * errors[1] + 1e-12


def test_a_gradient_lies_in_memory_as_its_matrix():
    """The reason for all this: einsum's is transposed, and an optimiser copies it."""
    x, w = operands((2, 5, 6), (3, 4, 6))
    w.requires_grad_()
    [found] = torch.autograd.grad(einsum(x, w, "... e, h d e -> ... h d").sum(), w)
    assert found.stride() == w.stride()
    [found] = torch.autograd.grad(einops.einsum(x, w, "... e, h d e -> ... h d").sum(), w)
    assert found.stride() != w.stride()


def test_nothing_is_copied():
    x, w = operands((2, 5, 3, 4), (6, 3, 4))
    w.requires_grad_()
    with Products() as seen:
        y = einsum(x, w, "... h d, e h d -> ... e")
        torch.autograd.grad(y, w, torch.ones_like(y))
    assert seen.seen == ["mm", "mm"]


def test_dims_that_do_not_fit_are_einsums_to_refuse():
    """h d of 3 4 beside 4 3: as many numbers, but others."""
    x, w = operands((2, 3, 4), (6, 4, 3))
    with pytest.raises(RuntimeError, match="einsum"):
        einsum(x, w, "... h d, e h d -> ... e")
    torch.testing.assert_close(  # a dim of one is repeated, by einsum
        einsum(x[..., :1], w[:, :, 0], "... e, f e -> ... f"),
        einops.einsum(x[..., :1], w[:, :, 0], "... e, f e -> ... f"),
    )


def test_empty():
    x = torch.zeros(0, 6)
    assert einsum(x, torch.ones(3, 4, 6), "... e, h d e -> ... h d").shape == (0, 3, 4)
    assert einsum(torch.ones(2, 6), torch.ones(0, 6), "... e, f e -> ... f").shape == (2, 0)


def test_more_than_two_and_one():
    a = torch.randn(3, 3)
    torch.testing.assert_close(einsum(a, "i i -> i"), a.diagonal())
    torch.testing.assert_close(einsum(a, a, a, "i j, j k, k l -> i l"), a @ a @ a)


def test_a_mode_sees_einsum():
    class Seen(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls.append(func)
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        einsum(torch.ones(2, 3), torch.ones(4, 5, 3), "... e, h d e -> ... h d")
    assert torch.einsum in seen.calls
    assert torch.nn.functional.linear not in seen.calls


@pytest.mark.filterwarnings("error")
def test_compiled_is_one_graph_with_its_gradient():
    torch._dynamo.reset()
    x, w = operands((2, 5, 6), (3, 4, 6))

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return einsum(x, w, "... e, h d e -> ... h d").sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    w.requires_grad_()
    found, want = (torch.autograd.grad(f(x, w), w)[0] for f in (compiled, loss))
    torch.testing.assert_close(found, want)
    by_func = torch.compile(grad(loss, 1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(by_func(x, w.detach()), want)
