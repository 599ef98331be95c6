"""The choice of a kernel, and what the CUDA kernels do around their libraries, on the CPU."""

import itertools
from functools import partial

import pytest
import torch
from torch.func import grad, vmap
from torch.nn.attention.flex_attention import create_block_mask

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import KernelError
from funcmodels.ops import attention_flash, attention_flex, attention_kernels
from funcmodels.ops import attention_reference as reference
from funcmodels.ops.attention_documents import documents
from funcmodels.ops.attention_kernel import Call, Kernel
from funcmodels.ops.attention_opaque import opaque
from funcmodels.ops.attention_reference import Inputs, Rules

SEQ = 6
RULES = Rules(True, 0.5, None, None)
IDS = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 4, 4, 4, 2]])


def call(*, d=8, dv=8, sinks=False, slopes=False, ids=None, rules=RULES):
    q, k, v = (torch.randn(2, SEQ, h, n, dtype=torch.float64) for h, n in ((4, d), (2, d), (2, dv)))
    heads = [torch.randn(1, 4, dtype=torch.float64) if given else None for given in (sinks, slopes)]
    return Call(Inputs(q, k, v, *heads), ids, rules)


def close(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_the_fastest_that_has_everything():
    assert attention_kernels.choose(call()).name == "cpu_flash"
    capped = call(rules=RULES._replace(softcap=1.0))
    assert attention_kernels.choose(capped).name == "reference"


def test_a_kernel_by_name():
    q, k, v = call().x[:3]
    want = ops.attention(q, k, v)
    for name in ("reference", "cpu_flash"):
        with fm.attention_kernel(name):
            assert attention_kernels.forced() == name
            torch.testing.assert_close(ops.attention(q, k, v), want)
            with fm.attention_kernel(None):
                assert attention_kernels.forced() is None
    assert attention_kernels.forced() is None


def test_the_backward_stays_with_the_name_of_its_forward():
    q, k, v = (t.requires_grad_() for t in call().x[:3])
    with fm.attention_kernel("reference"):
        out = ops.attention(q, k, v)
    assert out.grad_fn.rules.kernel == "reference"


def test_a_kernel_that_lacks_something_refuses():
    q, k, v = call().x[:3]
    with (
        fm.attention_kernel("cpu_flash"),
        pytest.raises(KernelError, match=r"does not have: softcap[\s\S]*fix: +.*'reference'"),
    ):
        ops.attention(q, k, v, softcap=1.0)
    for name in ("flash_attn", "cudnn", "flash", "flex"):
        with fm.attention_kernel(name), pytest.raises(KernelError, match="the device cpu"):
            ops.attention(q, k, v)


def test_no_kernel_of_that_name():
    with (
        pytest.raises(KernelError, match=r"named 'fast'[\s\S]*one of flash_attn, cudnn"),
        fm.attention_kernel("fast"),
    ):
        pass


def test_documents_are_the_runs_of_each_row():
    found = documents(IDS, IDS.shape[:1])
    assert found is not None
    assert found.starts.tolist() == [0, 3, 6, 8, 11, 12]  # a new row begins a new one
    assert found.starts.dtype == torch.int32
    assert found.longest == 3


def test_ids_shared_by_a_batch():
    found = documents(IDS[:1], torch.Size((3,)))
    assert found is not None
    assert found.starts.tolist() == list(range(0, 19, 3))


def test_ids_that_come_back_are_no_documents():
    assert documents(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]), torch.Size((2,))) is None


def test_documents_are_found_once_until_the_ids_are_written_to(monkeypatch):
    ids = IDS.clone()
    first = documents(ids, ids.shape[:1])
    assert documents(ids, ids.shape[:1]) is first
    ids[0] = 0
    again = documents(ids, ids.shape[:1])
    assert again is not None
    assert again.longest == SEQ


def library_forward(q, k, v, at):
    """A flash library for (tokens, heads, d), out of the reference: one document at a time."""
    starts = [0, SEQ] if at.starts is None else at.starts.tolist()
    rows = [(q, k, v)] if at.starts is not None else list(zip(q, k, v, strict=True))
    outs, lses = [], []
    for row in rows:
        for a, b in itertools.pairwise(starts):
            x = Inputs(*(t[a:b] for t in row), None, None)
            out, lse = reference.forward(x, None, at.rules)
            outs.append(out)
            lses.append(lse)
    if at.starts is None:
        return torch.stack(outs), torch.stack(lses)
    return torch.cat(outs), torch.cat(lses, dim=-1)


def library_backward(grad_out, q, k, v, out, lse, at):
    """Its backward, from the out and the lse that it is given, as flash kernels do."""
    starts = [0, SEQ] if at.starts is None else at.starts.tolist()
    if at.starts is not None:
        tensors, lse = [t[None] for t in (grad_out, q, k, v, out)], lse[None]
    else:
        tensors = [grad_out, q, k, v, out]
    grads = [torch.zeros_like(t) for t in tensors[1:4]]
    group = q.shape[-2] // k.shape[-2]
    for n in range(len(tensors[0])):
        for a, b in itertools.pairwise(starts):
            do, q1, k1, v1, o = (t[n, a:b].transpose(0, 1) for t in tensors)
            k2, v2 = (t.repeat_interleave(group, 0) for t in (k1, v1))
            delta = reference.distance(b - a, q.device)
            seen = reference.visible(delta, None, at.rules.causal, at.rules.window)
            scores = q1 @ k2.mT * at.rules.scale
            scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
            p = torch.exp(scores - lse[n, :, a:b, None])
            ds = p * (do @ v2.mT - (do * o).sum(-1, keepdim=True)) * at.rules.scale
            parts = ds @ k2, ds.mT @ q1, p.mT @ do
            for g, part, heads in zip(grads, parts, (q1, k1, v1), strict=True):
                part = part.unflatten(0, (len(heads), -1)).sum(1)
                g[n, a:b] += part.transpose(0, 1)
    return tuple(g[0] if at.starts is not None else g for g in grads)


@pytest.mark.parametrize(
    "sizes", [attention_flash.TORCH_SIZES, attention_flash.PACKAGE_SIZES], ids=["torch", "package"]
)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rules", [RULES, RULES._replace(causal=False, window=2)])
def test_flash_around_a_library(packed, sinks, sizes, rules):
    c = call(d=8, dv=3, sinks=sinks, ids=IDS if packed else None, rules=rules)
    out, lse = attention_flash._forward(library_forward, sizes, c)
    want, want_lse = reference.forward(*c)
    close((out, lse), (want, want_lse))
    grad_out = torch.randn_like(out)
    got = attention_flash._backward(library_backward, sizes, c, grad_out, out, lse)
    close(got, reference.vjp(c.x, grad_out, c.segment_ids, c.rules))


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_the_function_that_flex_compiles(causal, window, softcap, slopes, ids):
    rules = Rules(causal, 0.5, window, softcap)
    c = call(slopes=slopes, ids=ids, rules=rules)
    c = c._replace(x=Inputs(*(None if t is None else t.float() for t in c.x)))
    heads, per_head, rows = attention_flex._arguments(c)
    mask = attention_flex.mask_of(create_block_mask, rows, rules, heads[0])
    out, lse = attention_flex.attend(*heads, per_head, mask, rules)
    want, want_lse = reference.forward(*c)
    close((out.transpose(1, 2)[..., :8], lse), (want.double(), want_lse.double()))


@pytest.fixture(scope="module")
def opaque_kernel():
    """The reference as operators, as the CUDA kernels are, chosen by a name of its own."""
    plain = attention_kernels.REFERENCE
    kernel = opaque(Kernel("of_tests", plain.lacks, plain.forward, plain.backward))
    attention_kernels.KERNELS["of_tests"] = kernel
    yield
    del attention_kernels.KERNELS["of_tests"]


@pytest.mark.parametrize("packed", [False, True])
def test_an_opaque_kernel_under_the_transforms(opaque_kernel, packed):
    c = call(sinks=True)
    leaves = [t.float() for t in (*c.x[:3], c.x.sinks[0])]
    ids = IDS if packed else None

    def loss(q, k, v, sinks, ids):
        return ops.attention(q, k, v, sinks=sinks, segment_ids=ids, window=3).square().sum()

    by = (0, 1, 2, 3)
    many = [t.expand(3, *t.shape) for t in leaves]
    samples = vmap(grad(loss, by), (0, 0, 0, 0, None))
    want, many_want = grad(loss, by)(*leaves, ids), samples(*many, ids)
    torch._dynamo.reset()
    compiled = torch.compile(grad(loss, by), fullgraph=True, backend="aot_eager")
    with fm.attention_kernel("of_tests"):
        torch.testing.assert_close(grad(loss, by)(*leaves, ids), want)
        torch.testing.assert_close(samples(*many, ids), many_want)
        torch.testing.assert_close(compiled(*leaves, ids), want)
    torch._dynamo.reset()


def test_a_compiled_function_follows_the_name(opaque_kernel):
    q, k, v = (t.float() for t in call().x[:3])
    seen = []

    def backend(graph, _inputs):
        return graph

    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    f = torch.compile(partial(ops.attention, q, k, v), fullgraph=True, backend=backend)
    for name in ("reference", "of_tests"):
        with fm.attention_kernel(name):
            seen.append(f())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    torch.testing.assert_close(*seen)
    torch._dynamo.reset()
