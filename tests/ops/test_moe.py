"""Experts, against every expert on every token in float64, and against transformers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from funcmodels import ops
from funcmodels.errors import ShapeError
from funcmodels.ops.grouped import grouped_linear, grouped_outer

EXPERTS, MLP, HIDDEN, K = 5, 6, 4, 2
GPT_OSS = {"activation": "swigluoai", "alpha": 1.702, "limit": 0.7}
ACTIVATIONS = [{"activation": name} for name in ("silu", "gelu", "gelu_tanh")] + [GPT_OSS]
WEIGHTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def weights(dtype=torch.float64):
    shapes = [(EXPERTS, MLP, HIDDEN)] * 2 + [(EXPERTS, HIDDEN, MLP)]
    shapes += [(EXPERTS, MLP)] * 2 + [(EXPERTS, HIDDEN)]
    return {n: torch.randn(s, dtype=dtype) for n, s in zip(WEIGHTS, shapes, strict=True)}


def tokens(*batch, dtype=torch.float64):
    """x, weights and ids; the last expert is never chosen, so that a group is empty."""
    logits = torch.randn(*batch, EXPERTS, dtype=dtype)
    logits[..., -1] = -torch.inf
    top, ids = logits.softmax(-1).topk(K, dim=-1)
    return torch.randn(*batch, HIDDEN, dtype=dtype), top, ids


def run(w, x, top, ids, **options):
    return ops.experts(x, top, ids, **w, **(options or {"activation": "silu"}))


def act(g, u, activation="silu", alpha=None, limit=None):
    if activation == "silu":
        return g / (1 + torch.exp(-g)) * u
    if activation == "gelu":
        return g * 0.5 * (1 + torch.erf(g / 2**0.5)) * u
    if activation == "gelu_tanh":
        return g * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))) * u
    g, u = torch.minimum(g, torch.tensor(limit)), u.clamp(-limit, limit)
    return g / (1 + torch.exp(-alpha * g)) * (u + 1)


def dense(w, x, top, ids, **options):
    """Every expert on every token, masked by one-hot ids: no index depends on the data."""
    g = torch.einsum("...e,xfe->...xf", x, w["gate"]) + w["gate_bias"]
    u = torch.einsum("...e,xfe->...xf", x, w["up"]) + w["up_bias"]
    y = torch.einsum("...xf,xef->...xe", act(g, u, **options), w["down"]) + w["down_bias"]
    chosen = (torch.nn.functional.one_hot(ids, EXPERTS) * top[..., None]).sum(-2)
    return torch.einsum("...xe,...x->...e", y, chosen)


@pytest.mark.parametrize("options", ACTIVATIONS, ids=lambda o: o["activation"])
def test_values_and_gradients(options):
    w, (x, top, ids) = weights(), tokens(3, 7)

    def both(f):
        return grad(lambda w, x, top: f(w, x, top, ids, **options).cos().sum(), (0, 1, 2))

    torch.testing.assert_close(run(w, x, top, ids, **options), dense(w, x, top, ids, **options))
    torch.testing.assert_close(both(run)(w, x, top), both(dense)(w, x, top))


def test_autograd_agrees_with_finite_differences():
    w, (x, top, ids) = weights(), tokens(2)
    leaves = [t.requires_grad_() for t in (x, top, *w.values())]

    def f(x, top, *w):
        return run(dict(zip(WEIGHTS, w, strict=True)), x, top, ids)

    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)  # along random directions


def test_the_same_expert_twice_and_no_batch():
    w, (x, top, _) = weights(), tokens()
    ids = torch.tensor([3, 3])
    torch.testing.assert_close(run(w, x, top, ids), dense(w, x, top, ids))
    assert run(w, x[None][:0], top[None][:0], ids[None][:0]).shape == (0, HIDDEN)


def test_vmap_over_tokens_weights_and_both():
    w, (x, top, ids) = weights(), tokens(3, 7)
    many = {n: torch.stack([t, t.cos(), t.sin()], 1) for n, t in w.items()}  # vmapped dim inside
    each = [{n: t.select(1, i) for n, t in many.items()} for i in range(3)]
    by_token = vmap(run, (None, 0, 0, 0))(w, x, top, ids)
    torch.testing.assert_close(by_token, run(w, x, top, ids))
    ensemble = vmap(run, (1, None, None, None))(many, x, top, ids)
    torch.testing.assert_close(ensemble, torch.stack([run(one, x, top, ids) for one in each]))
    both = vmap(run, (1, 0, 0, 0))(many, x, top, ids)
    want = torch.stack([run(each[i], x[i], top[i], ids[i]) for i in range(3)])
    torch.testing.assert_close(both, want)
    nested = vmap(vmap(run, (None, 0, 0, 0)), (1, None, None, None))(many, x, top, ids)
    torch.testing.assert_close(nested, ensemble)


def loss(w, x, top, ids):
    return run(w, x, top, ids).cos().sum()


def test_per_sample_gradients_and_the_gradient_of_a_vmap():
    w, (x, top, ids) = weights(), tokens(3, 7)
    got = vmap(grad(loss), (None, 0, 0, 0))(w, x, top, ids)
    want = [grad(loss)(w, x[i], top[i], ids[i]) for i in range(3)]
    torch.testing.assert_close(got, {n: torch.stack([g[n] for g in want]) for n in w})
    total = grad(lambda w: vmap(loss, (None, 0, 0, 0))(w, x, top, ids).sum())(w)
    torch.testing.assert_close(total, grad(loss)(w, x, top, ids))
    twice = vmap(vmap(grad(loss), (None, 0, 0, 0)), (None, 0, 0, 0))
    got = twice(w, x[..., None, :], top[..., None, :], ids[..., None, :])
    torch.testing.assert_close({n: g.sum((0, 1)) for n, g in got.items()}, total)


def test_forward_mode_of_itself_and_over_reverse():
    w, (x, top, ids) = weights(), tokens(4)
    t = torch.randn_like(x)

    def twice(f):
        return jvp(lambda x: jvp(lambda x: f(w, x, top, ids), (x,), (t,))[1], (x,), (t,))[1]

    torch.testing.assert_close(twice(run), twice(dense))
    assert twice(run).abs().max() > 1e-3

    def hvp(f):
        one = grad(lambda w: f(w, x, top, ids).cos().sum())
        return jvp(one, (w,), ({n: torch.ones_like(p) for n, p in w.items()},))[1]

    torch.testing.assert_close(hvp(run), hvp(dense))
    args = (x[0], top[0], ids[0])
    torch.testing.assert_close(
        hessian(lambda d: run(w | {"down": d}, *args).square().sum())(w["down"]),
        jacrev(jacrev(lambda d: dense(w | {"down": d}, *args).square().sum()))(w["down"]),
    )


def test_per_sample_hessian_vector_products():
    w, (x, top, ids) = weights(), tokens(3, 4)

    def hvp(x, top, ids):
        return jvp(grad(lambda w: loss(w, x, top, ids)), (w,), (w,))[1]

    got = vmap(hvp)(x, top, ids)
    want = [hvp(x[i], top[i], ids[i]) for i in range(3)]
    torch.testing.assert_close(got, {n: torch.stack([g[n] for g in want]) for n in w})


def test_rows_of_no_group_are_zero():
    rows, w = torch.randn(5, 3), torch.randn(2, 4, 3)
    bounds = torch.tensor([[3, 4], [1, 3]])  # not in order; rows 0 and 4 in none
    want = torch.zeros(5, 4)
    want[3], want[1:3] = rows[3] @ w[0].T, rows[1:3] @ w[1].T
    torch.testing.assert_close(grouped_linear(rows, w, bounds), want)
    sums = torch.stack([want[3:4].T @ rows[3:4], want[1:3].T @ rows[1:3]])
    torch.testing.assert_close(grouped_outer(want, rows, bounds, 2), sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    w, (x, top, ids) = weights(), tokens(20)
    want = dense(w, x, top, ids)
    low = {n: t.to(dtype) for n, t in w.items()}
    for weight_dtype in {dtype, torch.float32}:
        got = run(low, x.to(dtype), top.to(weight_dtype), ids.int())
        assert got.dtype == dtype
        error = (got.double() - want).norm() / want.norm()
        assert error < 4 * torch.finfo(dtype).eps


def test_a_symbolic_number_of_tokens_stays_symbolic():
    fake = FakeTensorMode(shape_env=ShapeEnv())
    symbolic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = fake.from_tensor(torch.zeros(13, HIDDEN).double(), symbolic_context=symbolic)
    w = {n: fake.from_tensor(t, static_shapes=True) for n, t in weights().items()}
    with fake:
        top, ids = (x @ w["gate"][:, 0].T).softmax(-1).topk(K, dim=-1)
        out, grads = run(w, x, top, ids), grad(loss)(w, x, top, ids)
    assert not isinstance(out.shape[0], int)
    assert {n: g.shape for n, g in grads.items()} == {n: t.shape for n, t in w.items()}
    assert fake.shape_env.guards == []


@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    w, (x, top, ids) = weights(), tokens(6)
    fast = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(w, x, top, ids), grad(loss)(w, x, top, ids))
    per_sample = vmap(grad(loss), (None, 0, 0, 0))
    fast = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(w, x, top, ids), per_sample(w, x, top, ids))
    torch._dynamo.reset()


def test_mixtral_of_transformers():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = {"hidden_size": HIDDEN, "intermediate_size": MLP}
    config = MixtralConfig(
        **sizes, num_local_experts=EXPERTS, num_experts_per_tok=K, experts_implementation="eager"
    )
    layer = MixtralSparseMoeBlock(config).requires_grad_(False)
    for p in layer.parameters():
        p.normal_()
    x = torch.randn(2, 7, HIDDEN)
    top, ids = (x @ layer.gate.weight.T).softmax(-1).topk(K, dim=-1)
    gate, up = layer.experts.gate_up_proj.chunk(2, dim=1)
    top = top / top.sum(-1, keepdim=True)
    got = ops.experts(x, top, ids, gate, up, layer.experts.down_proj, activation="silu")
    torch.testing.assert_close(got, layer(x))


def test_errors_name_the_fix():
    w, (x, top, ids) = weights(), tokens(3)
    with pytest.raises(ShapeError, match=r"need: +weights and ids \(3, k\)"):
        run(w, x, top[:, :1], ids)
    with pytest.raises(ShapeError, match="integer ids"):
        run(w, x, top, top)
    with pytest.raises(ShapeError, match=r'fix: +P\("experts mlp hidden"\)'):
        run(w | {"down": w["gate"]}, x, top, ids)
    with pytest.raises(ShapeError, match=r'need: +up_bias \(5, 6\)\n.*P\("experts mlp"\)'):
        run(w | {"up_bias": w["down_bias"]}, x, top, ids)
    with pytest.raises(ShapeError, match=r"fix: +x.to\(torch.float64\)"):
        run(w, x.float(), top, ids)
    with pytest.raises(ShapeError, match=r"one of silu, gelu"):
        run(w, x, top, ids, activation="relu")
    with pytest.raises(ShapeError, match=r"need: +alpha and limit"):
        run(w, x, top, ids, activation="swigluoai", limit=7.0)
    with pytest.raises(ShapeError, match=r'fix: +activation="swigluoai"'):
        run(w, x, top, ids, activation="silu", alpha=1.0)
