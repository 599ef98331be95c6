"""compile_to_torch: an ordinary module on one process, and the same model over two tp ranks."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import funcmodels as fm
from compiler import pipeline, torch_target
from compiler.mesh import device_of
from funcmodels.errors import ShapeError, ShardingError
from tests import tiny_llama
from tests.distributed.ranks import mesh_of, on_ranks


def tiny(**changes: Any) -> fm.Model:
    """A model whose vocabulary two ranks divide."""
    return tiny_llama.tiny(vocab_size=64, **changes)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and segment ids of two packed documents a row."""
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]).expand(2, 9)
    return tokens, positions, (torch.arange(9) > 4).long().expand(2, 9)


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_without_a_mesh_it_is_the_users_function():
    model = tiny()
    module = fm.compile_to_torch(model).reset(seed=3)
    weights = fm.init(model, seed=3)
    tokens, positions, segments = batch()
    expected = model.forward(weights, tokens, positions, segments)
    torch.testing.assert_close(module(tokens, positions, segments), expected, rtol=0, atol=0)


def test_positions_count_from_zero_by_default():
    module = fm.compile_to_torch(tiny()).reset(seed=0)
    tokens = torch.arange(6)
    torch.testing.assert_close(module(tokens), module(tokens, torch.arange(6)), rtol=0, atol=0)


def test_parameters_are_named_by_their_paths():
    model = tiny()
    parameters = dict(fm.compile_to_torch(model).named_parameters())
    assert set(parameters) == set(model.by_path)
    assert all(p.is_meta for p in parameters.values())


def test_trains_with_torch_optim():
    module = fm.compile_to_torch(tiny()).reset(seed=0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    tokens = batch()[0]
    losses = []
    for _ in range(40):
        loss = loss_of(module(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4.0
    assert losses[-1] < 0.5


def test_state_dict_round_trip():
    module = fm.compile_to_torch(tiny()).reset(seed=0)
    other = fm.compile_to_torch(tiny()).reset(seed=1)
    other.load_state_dict(module.state_dict())
    tokens = torch.arange(5)
    torch.testing.assert_close(other(tokens), module(tokens), rtol=0, atol=0)


def _on_two(kv_heads: int) -> dict[str, Any]:
    """On one of two processes: the loss, and every gradient, by autograd and by torch.func."""
    module = fm.compile_to_torch(tiny(num_key_value_heads=kv_heads), mesh_of(tp=2)).reset(seed=3)
    tokens, positions, segments = batch()
    loss = loss_of(module(tokens, positions, segments), tokens)
    loss.backward()

    def loss_fn(weights: Any) -> torch.Tensor:
        return loss_of(module.pure(weights, tokens, positions, segments), tokens)

    plain = fm.tree.map(lambda p: p.detach(), module.weights())
    functional = dict(fm.tree.items(torch.func.grad(loss_fn)(plain)))
    return {
        "loss": loss.detach(),
        "grads": {name: p.grad for name, p in module.named_parameters()},
        "functional": functional,
        "flat": module(tokens[0]).detach(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_two_processes_give_the_gradients_of_one(kv_heads: int):
    model = tiny(num_key_value_heads=kv_heads)
    weights = fm.init(model, seed=3)
    tokens, positions, segments = batch()

    def loss_fn(weights: Any) -> torch.Tensor:
        return loss_of(model.forward(weights, tokens, positions, segments), tokens)

    grads, loss = torch.func.grad_and_value(loss_fn)(weights)
    for rank, found in enumerate(on_ranks(2, _on_two, kv_heads)):
        torch.testing.assert_close(found["loss"], loss)
        flat = model.forward(weights, tokens[0], torch.arange(9))
        torch.testing.assert_close(found["flat"], flat, rtol=1e-5, atol=1e-5)
        for path, whole in fm.tree.items(grads):
            spec = model.specs[path]
            expected = whole
            for dim, axis in enumerate(spec):
                if axis == "tp" and whole.shape[dim] > 1:  # the one KV head lies on both
                    expected = whole.chunk(2, dim)[rank]
            for kind in ("grads", "functional"):
                torch.testing.assert_close(
                    found[kind][path],
                    expected,
                    rtol=1e-4,
                    atol=1e-6,
                    msg=lambda m, path=path: f"{path}: {m}",
                )


def test_a_mesh_that_does_not_divide_is_refused():
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=3)
    try:
        mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("tp",))
        with pytest.raises(ShardingError, match='cannot split axis "vocab"'):
            fm.compile_to_torch(tiny(), mesh)
        mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("cp",))
        with pytest.raises(ShardingError, match="knows no mesh dim 'cp'"):
            fm.compile_to_torch(tiny(), mesh)
        with pytest.raises(ShardingError, match="sequence_parallel needs ranks that share"):
            fm.compile_to_torch(tiny(), sequence_parallel=True)
    finally:
        dist.destroy_process_group()


def test_three_dims_of_tokens_are_refused_on_a_mesh():
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        module = fm.compile_to_torch(tiny(), mesh).reset(seed=0)
        with pytest.raises(ShapeError, match="tokens of 3 dims"):
            module(torch.zeros(1, 2, 3, dtype=torch.int64))
    finally:
        dist.destroy_process_group()


def test_parameters_lie_on_the_meshs_device(monkeypatch):
    """NCCL sends nothing from the CPU; a mesh of meta stands here for one of GPUs."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device_of(SimpleNamespace(device_type="cuda")) == torch.device("cuda", 3)
    assert device_of(None) == torch.device("cpu")
    for target in (torch_target, pipeline):
        monkeypatch.setattr(target, "device_of", lambda mesh: torch.device(mesh.device_type))
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    try:
        for name, make in (("fsdp", fm.compile_to_torch), ("pp", fm.pipeline_stage)):
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(name,))
            module = make(tiny(), mesh)
            monkeypatch.setattr(mesh, "_device_type", "meta")
            for filled in (module.reset(seed=0), module.load(fm.init(tiny(), seed=0))):
                assert {p.device.type for p in filled.parameters()} == {"meta"}, name
            own = module.reset(seed=0, device="cpu")
            assert {p.device.type for p in own.parameters()} == {"cpu"}, name
        assert module.pipelined().device == torch.device("meta")
        assert module.pipelined("cpu").device == torch.device("cpu")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dim", ["tp", "fsdp"])
def test_whole_weights_are_no_parts(dim: str):
    """As of `fm.init`: of fsdp, they would be gathered to wrong ones."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(dim,))
        module = fm.compile_to_torch(tiny(), mesh)
        weights, tokens = fm.init(tiny(), seed=0), torch.arange(6)
        with pytest.raises(ShapeError, match=r"not the part[^~]*the whole parameter[^~]*load"):
            module.pure(weights, tokens, tokens)
        with pytest.raises(ShapeError, match="not the part"):
            module.loss(weights, {"tokens": tokens[None]})
        module.pure(module.load(weights).weights(), tokens, tokens)
    finally:
        dist.destroy_process_group()


def test_a_process_group_goes_with_its_module():
    """One left in a reference cycle would keep its threads while the process ends."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    module = fm.compile_to_torch(tiny(), mesh).reset(seed=0)
    module(torch.arange(5))  # now linked
    group = weakref.ref(mesh.get_group("tp"))
    gc.disable()
    try:
        dist.destroy_process_group()
        assert group() is not None
        del mesh, module
        assert group() is None
    finally:
        gc.enable()
