"""Packed rows on a CPU, one document at a time: the reference's results, and no scores between."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import funcmodels as fm
from funcmodels import ops
from funcmodels.ops import attention_cpu_documents as by_documents
from funcmodels.ops.attention_documents import documents

SEQ = 96
ROWS = torch.tensor([[0] * 40 + [1] * 23 + [2] * 33, [5] * 1 + [3] * 95])
OPTIONS = {
    "causal": {},
    "not causal": {"causal": False},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]).double()},
    "scale": {"scale": 0.3},
}


def inputs(dtype: torch.dtype = torch.float64, dv: int = 16):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, SEQ, 4, 16), (2, SEQ, 2, 16), (2, SEQ, 2, dv))  # grouped queries
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def results(kernel: str | None, ids: torch.Tensor, dv: int = 16, **options):
    leaves = [t.requires_grad_() for t in inputs(dv=dv)]
    with fm.attention_kernel(kernel):
        out = ops.attention(*leaves, segment_ids=ids, **options)
        weight = torch.arange(out.numel()).reshape(out.shape).double().sin()
        return out, *torch.autograd.grad((out * weight).sum(), leaves)


@pytest.fixture
def calls(monkeypatch):
    """How many documents each forward and backward pass went through."""
    found = []
    plain = by_documents._groups

    def counted(at, heads, *, causal):
        found.append(len(at.starts) - 1)
        return plain(at, heads, causal=causal)

    monkeypatch.setattr(by_documents, "_groups", counted)
    return found


@pytest.fixture(params=[1, 16], ids=["one document a call", "documents of a length together"])
def threads(request, monkeypatch):
    """Of as many threads as a machine has: they decide how many documents a call is given."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dv", [16, 8])
def test_the_references_results(options, dv, calls, threads):
    want = results("reference", ROWS, dv, **options)
    assert calls == []
    torch.testing.assert_close(results("cpu_flash", ROWS, dv, **options), want)
    assert calls == [5, 5]  # forward and backward


def test_documents_of_about_one_length_are_one_batch():
    at = documents(ROWS, torch.Size((2,)))
    sizes = {
        causal: [
            (g.length, 1 if isinstance(g.tokens, slice) else len(g.tokens))
            for g in by_documents._groups(at, 1, causal=causal)
        ]
        for causal in (True, False)
    }
    assert sizes[True] == [(95, 1), (40, 2), (23, 1), (1, 1)]  # 33 tokens are filled up to 40
    assert sizes[False] == [(95, 1), (40, 1), (33, 1), (23, 1), (1, 1)]


def test_in_bfloat16_as_near_as_the_masked_kernel(threads):
    """Gradients of short documents are computed in float32."""
    exact = results("reference", ROWS)
    errors = []
    for ids in (
        ROWS,
        ROWS.clone().index_put_((torch.tensor(0), torch.tensor(95)), torch.tensor(0)),
    ):
        leaves = [t.bfloat16().requires_grad_() for t in inputs()]
        with fm.attention_kernel("cpu_flash"):
            out = ops.attention(*leaves, segment_ids=ids)
            weight = torch.arange(out.numel()).reshape(out.shape).double().sin()
            found = (out, *torch.autograd.grad((out * weight).sum(), leaves))
        want = exact if ids is ROWS else results("reference", ids)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, want, strict=True)])
    for ours, masked in zip(*errors, strict=True):
        assert ours < 1.2 * masked


def test_one_document_for_all_rows(calls):
    ids = torch.zeros(SEQ, dtype=torch.long).expand(2, SEQ)
    torch.testing.assert_close(results(None, ids), results("reference", ids))
    assert calls == [2, 2]


def test_what_a_mask_is_for(calls):
    back = ROWS.clone()
    back[0, -1] = 0  # an id that comes back after others
    short = torch.arange(SEQ).expand(2, SEQ) // 2
    for ids, options in ((back, {}), (short, {}), (ROWS, {"window": 7})):
        want = results("reference", ids, **options)
        torch.testing.assert_close(results("cpu_flash", ids, **options), want)
    assert calls == []


def test_documents_changed_in_place_are_seen():
    ids = ROWS.clone()
    results("cpu_flash", ids)
    ids[0] = 0
    torch.testing.assert_close(results("cpu_flash", ids), results("reference", ids))


def test_what_is_recorded_is_for_other_documents_too(calls):
    q, k, v = inputs()
    other = torch.zeros_like(ROWS)

    def attend(ids):
        return ops.attention(q, k, v, segment_ids=ids)

    torch.testing.assert_close(make_fx(attend)(ROWS)(other), attend(other))
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    compiled(ROWS)
    torch.testing.assert_close(compiled(other), attend(other))
    assert calls == [2, 2]  # those that are compared with


def test_per_sample_gradients(calls):
    q, k, v = inputs()

    def loss(q, k, v, ids):
        return ops.attention(q, k, v, segment_ids=ids).square().sum()

    found = torch.vmap(torch.func.grad(loss))(q, k, v, ROWS)
    want = torch.func.grad(loss)(q, k, v, ROWS)
    torch.testing.assert_close(found, want)
    assert calls == [5, 5, 5, 5]
