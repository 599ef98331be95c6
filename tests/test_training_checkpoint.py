"""Training checkpoints: whole or not there, on any mesh, without a pickle, out to Hugging Face."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import funcmodels as fm
from funcmodels import training_storage
from tests.distributed.ranks import forkserver
from tests.optim.test_against_torch import assert_same, tensors
from tests.tiny_llama import tiny, weights_of


def trees(seed: int = 0) -> dict[str, Any]:
    mixed = {
        "f": tensors(seed)["c"],
        "h": tensors(seed, torch.bfloat16),
        "step": torch.tensor(seed),
    }
    mixed["bytes"] = torch.arange(5, dtype=torch.uint8)
    mixed["transposed"] = tensors(seed)["a"].T
    mixed["row"] = mixed["f"][1]  # of the memory of another
    mixed["again"] = mixed["f"]
    mixed["empty"] = torch.zeros(0, 3)
    return {"one": mixed, "two": [tensors(seed + 1)]}


def blank() -> dict[str, Any]:
    return fm.tree.map(lambda x: torch.full_like(x, 9), trees())


@pytest.mark.parametrize("background", [False, True])
def test_round_trip(background, tmp_path):
    """And what is saved may be overwritten at once."""
    checkpoints, given = fm.Checkpoints(tmp_path, background=background), trees()
    checkpoints.save(7, given, {"said": [1, "two", None]})
    fm.tree.map(lambda x: x.zero_(), given)
    checkpoints.wait()
    got = blank()
    checkpoints.load(7, got)
    assert_same(got, trees())
    assert checkpoints.about(7) == {"said": [1, "two", None]}
    assert checkpoints.latest() == 7


def test_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(training_storage, "MAX_FILE", 1000)
    checkpoints = fm.Checkpoints(tmp_path, background=False)
    checkpoints.save(1, trees(), {})
    assert len(list((tmp_path / "step-00000001").glob("*.safetensors"))) > 3
    got = blank()
    checkpoints.load(1, got)
    assert_same(got, trees())


def test_the_last_are_kept(tmp_path):
    checkpoints = fm.Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 20):
        checkpoints.save(step, trees(step), {})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 20]
    checkpoints.save(20, trees(5), {})  # the same step again: the later one counts
    checkpoints.wait()
    got = blank()
    checkpoints.load(20, got)
    assert_same(got, trees(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000020"]


def test_half_of_one_is_none(tmp_path, monkeypatch):
    """Stopped before its rename it is not there; cut afterwards it is passed over, and said so."""
    checkpoints = fm.Checkpoints(tmp_path, background=False)
    checkpoints.save(1, trees(), {})
    with monkeypatch.context() as patch:
        patch.setattr(training_storage, "sync", lambda path: pytest.fail("the power went"))
        with pytest.raises(BaseException, match="the power went"):
            checkpoints.save(2, trees(), {})
    assert (tmp_path / ".step-00000002.saving/training.json").exists()
    assert checkpoints.steps() == [1]
    checkpoints.save(3, trees(), {})
    assert not list(tmp_path.glob(".*"))
    (file,) = (tmp_path / "step-00000003").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-00000003 is not whole"):
        assert checkpoints.latest() == 1
    error, said = fm.errors.CheckpointError, r"no whole checkpoint of step 3[^~]*steps 1"
    with pytest.warns(UserWarning, match="not whole"), pytest.raises(error, match=said):
        checkpoints.load(3, blank())


def test_an_error_in_the_background_is_raised(tmp_path, monkeypatch):
    checkpoints = fm.Checkpoints(tmp_path)
    checkpoints.save(1, trees(), {})
    checkpoints.wait()
    failed: Future[Any] = Future()
    failed.set_exception(OSError("disk full"))
    monkeypatch.setattr(training_storage, "start_save", lambda *_: failed)
    checkpoints.save(2, trees(), {})
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(3, trees(), {})


def test_nothing_is_pickled_or_unpickled(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    checkpoints = fm.Checkpoints(tmp_path, background=False)
    checkpoints.save(1, trees(), {})
    checkpoints.load(1, blank())
    files = {path.suffix for path in (tmp_path / "step-00000001").iterdir()}
    assert files == {".safetensors", ".json"}


def test_refusals(tmp_path):
    checkpoints = fm.Checkpoints(tmp_path, background=False)
    error = fm.errors.CheckpointError
    checkpoints.save(1, trees(), {})
    got = blank()
    more = {**got["one"], "a": torch.zeros(1), "b": torch.zeros(1)}
    with pytest.raises(error, match=r"2 of 13 tensors are not in[^~]*missing: one.a, one.b"):
        checkpoints.load(1, {"one": more})
    with pytest.raises(error, match=r"holds 1 tensors that are not asked for[^~]*unused: one.f"):
        checkpoints.load(1, {"one": {k: v for k, v in got["one"].items() if k != "f"}})
    with pytest.raises(
        error, match=r"one.f is another tensor[^~]*\(24, 8\) torch.float32[^~]*\(8, 24\)"
    ):
        checkpoints.load(1, {**got, "one": {**got["one"], "f": torch.zeros(8, 24)}})
    with pytest.raises(error, match=r"one.f is another tensor[^~]*need: \(24, 8\) torch.float64"):
        checkpoints.load(1, {**got, "one": {**got["one"], "f": got["one"]["f"].double()}})
    assert_same(got, blank())  # nothing was written
    with pytest.raises(error, match=r"not what JSON can hold[^~]*nothing is pickled"):
        checkpoints.save(2, trees(), {"x": torch.zeros(1)})
    with pytest.raises(error, match=r"one.x is no tensor\n[^~]*int"):
        checkpoints.save(2, {"one": {"x": 3}}, {})
    with pytest.raises(error, match=r'two tensors have the path "a.b.c"'):
        checkpoints.save(2, {"a": {"b": {"c": got["one"]["f"]}, "b.c": got["one"]["f"]}}, {})
    with pytest.raises(error, match="keep=1"):
        fm.Checkpoints(tmp_path, keep=0)
    assert checkpoints.steps() == [1]


def test_out_to_hugging_face(tmp_path):
    model = tiny()
    weights = weights_of(model, torch.bfloat16)
    checkpoints = fm.Checkpoints(tmp_path / "run", background=False)
    checkpoints.save(4, {"weights": weights, "optimizer": fm.optim.adamw(0.1).init(weights)}, {})
    fm.save(model, checkpoints.load_weights(model), tmp_path / "model")
    assert_same(fm.load(model, tmp_path / "model"), weights)
    with pytest.raises(fm.errors.CheckpointError, match="no checkpoint in"):
        fm.Checkpoints(tmp_path / "nothing").load_weights(model)


# --- several processes ---------------------------------------------------------------------------


def join(rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)


def on_ranks(target: Any, size: int, *args: Any) -> None:
    """Run a function of (rank, size, port, *args) in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = forkserver()
    ranks = [context.Process(target=target, args=(rank, size, port, *args)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * size


WHOLE = torch.arange(7 * 6, dtype=torch.float32).view(7, 6)  # 2 and 3 ranks do not divide the rows


def placed(shape: tuple[int, ...], names: tuple[str, ...], placements: list[Any]) -> DTensor:
    return distribute_tensor(
        WHOLE, init_device_mesh("cpu", shape, mesh_dim_names=names), placements
    )


def save_on(rank: int, size: int, port: int, folder: Path) -> None:
    """A matrix in parts, one on each rank, something that all have, and numbers of each rank."""
    join(rank, size, port)
    checkpoints = fm.Checkpoints(folder)
    for step in (1, 2, 3):  # in the background, while the ranks talk to each other
        part = placed((size,), ("fsdp",), [Shard(0)])
        checkpoints.save(step, {"w": {"part": part + step, "same": WHOLE * step}}, {"n": size})
        for _ in range(20):
            dist.all_reduce(torch.ones(3))
    checkpoints.wait()
    dist.barrier()
    assert checkpoints.steps() == [1, 2, 3]
    dist.destroy_process_group()


def load_on(rank: int, size: int, port: int, folder: Path) -> None:
    join(rank, size, port)
    checkpoints = fm.Checkpoints(folder)
    for shape, names, placements in (
        ((size,), ("fsdp",), [Shard(0)]),
        ((size,), ("tp",), [Shard(1)]),
        ((size,), ("dp",), [Replicate()]),
    ):
        part = torch.zeros_like(placed(shape, names, placements))
        same = torch.zeros_like(WHOLE)
        checkpoints.load(3, {"w": {"part": part, "same": same}})
        assert torch.equal(part.full_tensor(), WHOLE + 3)
        assert torch.equal(same, WHOLE * 3)
    dist.destroy_process_group()


@pytest.mark.slow
def test_saved_on_one_mesh_and_loaded_on_others(tmp_path):
    on_ranks(save_on, 2, tmp_path)
    part, same = torch.zeros(7, 6), torch.zeros(7, 6)
    fm.Checkpoints(tmp_path).load(3, {"w": {"part": part, "same": same}})  # one process
    assert torch.equal(part, WHOLE + 3)
    assert torch.equal(same, WHOLE * 3)
    on_ranks(load_on, 3, tmp_path)
    contents = json.loads((tmp_path / "step-00000003/training.json").read_text())
    assert len(contents["files"]) == 2  # a file of each rank
    # A file less, and its part of the tensor is missed, not taken for zeros.
    (file,) = (tmp_path / "step-00000003").glob("shard-00001*")
    file.unlink()
    del contents["files"][file.name]
    (tmp_path / "step-00000003/training.json").write_text(json.dumps(contents))
    with pytest.raises(fm.errors.CheckpointError, match=r"w.same|parts of w.part are missing"):
        fm.Checkpoints(tmp_path).load(3, {"w": {"part": part, "same": same}})


def fit_on(
    rank: int, size: int, port: int, folder: Path, steps: int, expected: list[float]
) -> None:
    """Each rank trains the same, and all stop together although one is asked."""
    join(rank, size, port)
    model = tiny(vocab_size=16, num_hidden_layers=1)

    def data(position: int) -> Any:
        if rank == 1 and position == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return fm.pack([torch.arange(8) + position % 8], 8)

    fitted = fm.fit(model, fm.init(model, seed=0), data, steps=99, optimizer=fm.optim.adamw(0.01),
                    checkpoints=folder, save_every=2, progress=False)  # fmt: skip
    assert fitted.step == steps
    assert fitted.losses == expected
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(tmp_path):
    model = tiny(vocab_size=16, num_hidden_layers=1)
    alone = fm.fit(model, fm.init(model, seed=0), lambda n: fm.pack([torch.arange(8) + n % 8], 8),
                   steps=7, optimizer=fm.optim.adamw(0.01), progress=False).losses  # fmt: skip
    on_ranks(fit_on, 2, tmp_path, 3, alone[:3])
    on_ranks(fit_on, 3, tmp_path, 5, alone[3:5])  # resumed by another number of processes
    assert fm.Checkpoints(tmp_path).steps() == [3, 4, 5]


# --- fm.fit on meshes ----------------------------------------------------------------------------

MESHES = {
    "dp": ((2,), ("dp",)),
    "fsdp": ((2,), ("fsdp",)),
    "tp": ((2,), ("tp",)),
    "fsdp_tp": ((2, 2), ("fsdp", "tp")),
}


def documents(number: int) -> Any:
    """Four rows, of which the last has half as many tokens as the others."""
    starts = torch.arange(4)[:, None] * 3 + number
    rows = list((starts + torch.arange(8)) % 16)
    return fm.pack([*rows[:3], rows[3][:4]], 8)


def mesh_fit(rank: int, size: int, port: int, folder: Path, mesh: str, steps: int) -> None:
    join(rank, size, port)
    shape, names = MESHES[mesh]
    devices = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = tiny(vocab_size=16, num_hidden_layers=1)
    module = fm.compile_to_torch(model, devices).reset(seed=0)
    share = 1 if mesh == "tp" else 2
    own = 0 if mesh == "tp" else devices.get_local_rank(names[0])

    def data(number: int) -> Any:
        return {name: value.chunk(share)[own] for name, value in documents(number).items()}

    fitted = fm.fit(module, module.weights(), data, steps=steps, optimizer=fm.optim.adamw(0.02),
                    clip=0.5, checkpoints=folder / "run", log=folder / "log.jsonl",
                    progress=False)  # fmt: skip
    assert fitted.step == steps
    if mesh in ("fsdp", "tp"):
        muon = fm.optim.muon(0.1, fm.optim.matrices(model), rest=fm.optim.adamw(0.1))
        clipped = fm.optim.chain(fm.optim.clip_by_global_norm(1.0), fm.optim.adamw(0.1))
        for optimizer in (muon, clipped):
            found = fm.fit(module, module.weights(), data, steps=2, optimizer=optimizer,
                           progress=False)  # fmt: skip
            assert found.losses[1] < found.losses[0]
    dist.destroy_process_group()


@pytest.mark.slow
def test_fit_on_one_mesh_after_another(tmp_path):
    """Losses, norms and weights are those of one process; each mesh goes on from the last one's."""
    model = tiny(vocab_size=16, num_hidden_layers=1)
    alone = fm.fit(model, fm.init(model, seed=0), documents, steps=10, clip=0.5,
                   optimizer=fm.optim.adamw(0.02), log=tmp_path / "alone.jsonl",
                   progress=False)  # fmt: skip
    for steps, mesh in zip((2, 4, 6, 8), MESHES, strict=True):
        size = 4 if mesh == "fsdp_tp" else 2
        on_ranks(mesh_fit, size, tmp_path, mesh, steps)
    fm.fit(model, fm.init(model, seed=0), documents, steps=10, clip=0.5,
           optimizer=fm.optim.adamw(0.02), checkpoints=tmp_path / "run",
           log=tmp_path / "log.jsonl", progress=False)  # fmt: skip

    def curve(name: str) -> list[tuple[float, float]]:
        rows = map(json.loads, (tmp_path / name).read_text().splitlines())
        return [(row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "step"]

    for got, expected in zip(curve("log.jsonl"), curve("alone.jsonl"), strict=True):
        assert got == pytest.approx(expected, rel=2e-5)
    weights = fm.Checkpoints(tmp_path / "run").load_weights(model)
    close = {"atol": 1e-4, "rtol": 1e-3}
    fm.tree.map(lambda a, b: torch.testing.assert_close(a, b, **close), weights, alone.weights)
