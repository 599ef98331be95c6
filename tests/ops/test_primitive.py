"""What a tracer, a compiler and a tensor subclass see of the ops."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode

from funcmodels import ops
from funcmodels.ops.primitive import ALL

VOCAB, HIDDEN, HEADS, KV_HEADS, DIM = 11, 8, 4, 2, 4
NAMES = ["embed", "rms_norm", "rope", "attention", "swiglu", "geglu", "experts"]
NAMES += ["latent_attention", "layer_norm", "unembed"]
LOSSES = ["cross_entropy"]  # not in a forward function


def weights():
    shapes = {
        "embed": (VOCAB, HIDDEN),
        "norm": (HIDDEN,),
        "q": (HEADS, DIM, HIDDEN),
        "kv": (KV_HEADS, DIM, HIDDEN),
        "o": (HIDDEN, HEADS, DIM),
        "sinks": (HEADS,),
        "up": (3, HEADS, HIDDEN),
        "down": (3, HIDDEN, HEADS),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def model(p, tokens, positions, softcap=None, scaling=None):
    """Each op once."""
    x = ops.embed(tokens, p["embed"])
    h = ops.rms_norm(x, p["norm"], eps=1e-5)
    q, k = (torch.einsum("...e,hde->...hd", h, p[name]) for name in ("q", "kv"))
    q, k = ops.rope(q, k, positions, theta=1e4, scaling=scaling, max_position=4)
    o = ops.attention(q, k, k[..., :3], sinks=p["sinks"], segment_ids=tokens // 6, softcap=softcap)
    x = x + torch.einsum("...hd,ehd->...e", o, p["o"][..., :3])
    x = x + ops.geglu(ops.swiglu(x, x), x, approximate="tanh")
    top, ids = x[..., :3].topk(2, dim=-1)
    x = x + ops.experts(x, top, ids, p["up"], p["up"], p["down"], activation="silu")
    o = ops.latent_attention(q[..., :2], q[..., 2:], x, k[..., :1, 2:], p["q"])
    x = x + torch.einsum("...hd,ehd->...e", o, p["o"][..., :2])
    return ops.unembed(ops.layer_norm(x, p["norm"], eps=1e-5), p["embed"])


def loss(p, tokens, positions, **kwargs):
    return model(p, tokens, positions, **kwargs).logsumexp(-1).mean()


def batch(seq, dynamic=False):
    tokens = torch.randint(0, VOCAB, (2, seq))
    positions = torch.arange(seq).repeat(2, 1)
    for t in (tokens, positions) if dynamic else ():
        torch._dynamo.mark_dynamic(t, 1)
    return tokens, positions


class Record(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def test_the_registry_holds_the_public_ops():
    assert sorted(ALL) == sorted(NAMES + LOSSES)
    assert all(getattr(ops, name) is op for name, op in ALL.items())


def test_a_mode_sees_each_op_as_one_call_of_itself():
    p, args = weights(), batch(5)
    with Record() as mode:
        got = model(p, *args)
    seen = [f for f in mode.calls if f in ALL.values()]
    assert seen == [ALL[name] for name in (*NAMES[:4], "swiglu", "geglu", *NAMES[6:])]
    assert torch.einsum in mode.calls
    assert torch.nn.functional.silu not in mode.calls
    torch.testing.assert_close(got, model(p, *args))


def test_a_tensor_subclass_sees_them_too():
    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func

    gate = torch.ones(2).as_subclass(Seen)
    assert ops.swiglu(gate, torch.ones(2)) is ops.swiglu
    assert ops.layer_norm(torch.ones(2), None, gate, eps=1.0) is ops.layer_norm


def test_signatures_and_docs_survive():
    import inspect

    assert list(inspect.signature(ops.attention).parameters)[:4] == ["q", "k", "v", "causal"]
    assert ops.attention.__doc__.startswith("Softmax attention")


@pytest.mark.parametrize(("kind", "softcap"), [(None, None), ("dynamic", 2.0), ("longrope", None)])
def test_a_symbolic_sequence_stays_symbolic(kind, softcap):
    scaling = {
        None: None,
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
        "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2},
    }[kind]
    fake = FakeTensorMode(shape_env=ShapeEnv())
    symbolic = StatelessSymbolicContext([DimDynamic.DYNAMIC])
    tokens = fake.from_tensor(torch.zeros(13, dtype=torch.long), symbolic_context=symbolic)
    p = {n: fake.from_tensor(t, static_shapes=True) for n, t in weights().items()}
    with fake:
        out = model(p, tokens, tokens, softcap=softcap, scaling=scaling)
        grads = grad(loss)(p, tokens, tokens, softcap=softcap, scaling=scaling)
    assert not isinstance(out.shape[0], int)
    assert out.shape[0] is tokens.shape[0] or out.shape[0] == tokens.shape[0]
    assert {n: g.shape for n, g in grads.items()} == {n: t.shape for n, t in p.items()}
    assert fake.shape_env.guards == []


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_compiled_forward_and_autograd(compiled, softcap):
    p, args = weights(), batch(5)
    leaves = {n: t.clone().requires_grad_() for n, t in p.items()}
    got = compiled(loss)(leaves, *args, softcap=softcap)
    torch.testing.assert_close(got.detach(), loss(p, *args, softcap=softcap))
    grads = dict(zip(p, torch.autograd.grad(got, list(leaves.values())), strict=True))
    torch.testing.assert_close(grads, grad(loss)(p, *args, softcap=softcap))


@pytest.mark.slow
def test_compiled_gradient_of_any_length_is_compiled_once(compiled):
    p, fast = weights(), compiled(grad(loss))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seq in (5, 9):
        args = batch(seq, dynamic=True)
        torch.testing.assert_close(fast(p, *args), grad(loss)(p, *args))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.slow
def test_compiled_transforms_of_gradients(compiled):
    p, args = weights(), batch(5)
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    torch.testing.assert_close(compiled(per_sample)(p, *args), per_sample(p, *args))


def test_compiled_hessian_vector_product(compiled):
    # Of attention and rope: compiled, PyTorch's own layer_norm has no forward over reverse.
    _, positions = batch(5)
    q, k, v = (torch.randn(2, 5, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))

    def f(q):
        a, b = ops.rope(q, k, positions, theta=1e4)
        return ops.attention(a, b, v, window=3).square().sum()

    def hvp(q):
        return jvp(grad(f), (q,), (q.cos(),))[1]

    torch.testing.assert_close(compiled(hvp)(q), hvp(q), rtol=1e-4, atol=1e-5)
