"""`ops.latent_attention` against loops over heads in float64, and against its own derivatives."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from funcmodels import ops
from funcmodels.errors import ShapeError

SEQ, HEADS, NOPE, ROPE, DV, RANK = 7, 3, 6, 4, 5, 8
NAMES = ("q_nope", "q_rope", "latent", "k_rope", "kv_up")


def operands(dtype=torch.float64, dv=DV, seed=0):
    torch.manual_seed(seed)
    shapes = (
        (2, SEQ, HEADS, NOPE),
        (2, SEQ, HEADS, ROPE),
        (2, SEQ, RANK),
        (2, SEQ, 1, ROPE),
        (HEADS, NOPE + dv, RANK),
    )
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def by_heads(q_nope, q_rope, latent, k_rope, kv_up, scale=None, segment_ids=None):
    """Each head by itself, with nothing but matrix products, a mask and a softmax."""
    seen = torch.ones(SEQ, SEQ, dtype=torch.bool).tril().expand(2, SEQ, SEQ)
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    out = []
    for head in range(HEADS):
        k_up, v_up = kv_up[head, :NOPE], kv_up[head, NOPE:]
        scores = q_nope[:, :, head] @ (latent @ k_up.T).transpose(1, 2)
        scores = scores + q_rope[:, :, head] @ k_rope[:, :, 0].transpose(1, 2)
        scores = scores * ((NOPE + ROPE) ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(weights @ (latent @ v_up.T))
    return torch.stack(out, dim=2)


@pytest.mark.parametrize("dv", [DV, NOPE + ROPE, 14])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("packed", [False, True])
def test_values(dv, scale, packed):
    given = operands(dv=dv)
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0] * 7]) if packed else None
    got = ops.latent_attention(*given, scale=scale, segment_ids=ids)
    assert got.shape == (2, SEQ, HEADS, dv)
    torch.testing.assert_close(got, by_heads(*given, scale=scale, segment_ids=ids))


@pytest.mark.parametrize("i", range(5), ids=NAMES)
def test_gradients(i):
    given = operands()
    weights = torch.randn(2, SEQ, HEADS, DV, dtype=torch.float64)

    def loss(fn):
        return grad(lambda *xs: (fn(*xs) * weights).sin().sum(), argnums=i)(*given)

    torch.testing.assert_close(loss(ops.latent_attention), loss(by_heads))


def test_forward_mode_and_hessian_vector_products():
    given, tangents = operands(), operands(seed=1)
    got = jvp(ops.latent_attention, given, tangents)
    torch.testing.assert_close(got, jvp(by_heads, given, tangents))

    def hvp(fn):
        def loss(kv_up):
            return fn(*given[:4], kv_up).square().sum()

        return jvp(grad(loss), given[4:], tangents[4:])

    torch.testing.assert_close(hvp(ops.latent_attention), hvp(by_heads))


def test_vmap_over_tokens_and_over_weights():
    one, two = operands(), operands(seed=1)
    both = tuple(torch.stack(pair) for pair in zip(one, two, strict=True))
    apart = torch.stack([ops.latent_attention(*one), ops.latent_attention(*two)])
    torch.testing.assert_close(vmap(ops.latent_attention)(*both), apart)


def test_bfloat16_is_within_its_rounding():
    given = operands(torch.bfloat16)
    got = ops.latent_attention(*given)
    assert got.dtype == torch.bfloat16
    exact = ops.latent_attention(*(t.double() for t in given))
    torch.testing.assert_close(got.double(), exact, rtol=0.02, atol=0.05)


CHANGES = {
    "queries": ({"q_rope": (2, SEQ, 2, ROPE)}, "not two parts of the same queries"),
    "no-head": ({"k_rope": (2, SEQ, ROPE)}, r"fix:  k_rope.unsqueeze\(-2\)"),
    "many-heads": ({"k_rope": (2, SEQ, HEADS, ROPE)}, "project it to 4 features a token"),
    "latent": ({"latent": (2, SEQ, HEADS, RANK)}, r"need: latent \(2, 7, 'rank'\)"),
    "flat": ({"kv_up": (HEADS * (NOPE + DV), RANK)}, r"need: kv_up \(3, 6 \+ dv, 8\)"),
    "keys-alone": ({"kv_up": (HEADS, NOPE, RANK)}, "rows of the keys first"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_shapes_that_do_not_fit(change):
    shapes, message = CHANGES[change]
    given = dict(zip(NAMES, operands(), strict=True))
    given |= {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    with pytest.raises(ShapeError, match=message):
        ops.latent_attention(**given)
