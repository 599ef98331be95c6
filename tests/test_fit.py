"""The training loop: what it computes, writes, resumes, and why it stops."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import funcmodels as fm
from funcmodels import ops
from tests.optim.test_against_torch import assert_same
from tests.tiny_llama import tiny

torch.set_num_threads(1)

MODEL = tiny(vocab_size=16, num_hidden_layers=1)


def batch(number: int) -> dict[str, Tensor]:
    """Counting up from random starts, in packed rows: a function of the batch's number."""
    generator = torch.Generator().manual_seed(number)
    start = torch.randint(0, 16, (4, 1), generator=generator)
    return fm.pack([(s + torch.arange(12)) % 16 for s in start], 24)


def train(steps: int = 8, weights: Any = None, data: Any = batch, **settings: Any) -> fm.Fitted:
    weights = fm.init(MODEL, seed=0) if weights is None else weights
    settings = {"optimizer": fm.optim.adamw(0.02), "progress": False, **settings}
    return fm.fit(MODEL, weights, data, steps=steps, **settings)


def rows(path: Any, kind: str = "step") -> list[dict[str, Any]]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == kind]


def test_it_is_the_loop_written_out():
    weights = fm.init(MODEL, seed=0)
    optimizer = fm.optim.chain(fm.optim.clip_by_global_norm(0.5), fm.optim.adamw(0.02))
    state, losses = optimizer.init(weights), []
    for number in range(8):
        step = fm.grad_and_value(lambda w, b: fm.loss(MODEL, w, b))
        grads, loss = step(weights, batch(number))
        weights, state = optimizer.update(grads, state, weights)
        losses.append(float(loss))
    fitted = train(clip=0.5)
    assert fitted.losses == losses
    assert_same(fitted.weights, weights)
    assert_same(fitted.state, state)


def test_it_learns_and_leaves_the_given_weights_alone():
    weights = fm.init(MODEL, seed=0)
    fitted = train(60, weights)
    assert fitted.losses[0] > 2.5
    assert fitted.losses[-1] < 0.3
    assert_same(weights, fm.init(MODEL, seed=0))


def test_donated_weights_are_trained_in_place():
    weights = fm.init(MODEL, seed=0)
    fitted = train(weights=weights, donate=True)
    assert_same(weights, fitted.weights)
    assert_same(weights, train().weights)
    assert fitted.weights["embed"].data_ptr() == weights["embed"].data_ptr()


def test_microbatches():
    """Two parts of a batch, and the batch: the same curve."""
    assert train(microbatches=2).losses == pytest.approx(train().losses, rel=1e-4)


def test_compute_dtype():
    """Computed in bfloat16, on float32 masters: what the cast written out gives."""

    def loss(model: fm.Model, weights: Any, batch: Any) -> Tensor:
        return fm.loss(model, fm.cast(model, weights, torch.bfloat16), batch)

    fitted, written_out = train(dtype=torch.bfloat16), train(loss=loss)
    assert fitted.losses == written_out.losses
    assert fitted.losses == pytest.approx(train().losses, rel=0.1)
    assert fitted.losses != train().losses
    assert_same(fitted.weights, written_out.weights)
    assert fitted.weights["embed"].dtype == torch.float32


def test_progress_log_and_evaluation(tmp_path):
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    settings = {"evaluate": lambda weights: {"rows": len(weights["embed"])}, "evaluate_every": 3}
    fitted = train(log=tmp_path / "log.jsonl", progress=True, console=console, **settings)
    said = console.file.getvalue()
    assert "tokens/s" in said
    assert "8/8" in said
    logged = rows(tmp_path / "log.jsonl")
    assert [row["loss"] for row in logged] == fitted.losses
    assert logged[0].keys() == {
        "kind", "step", "loss", "grad_norm", "tokens_per_second", "peak_memory_bytes"
    }  # fmt: skip
    assert logged[0]["tokens_per_second"] > 1
    assert logged[0]["peak_memory_bytes"] > 10 << 20
    evaluated = rows(tmp_path / "log.jsonl", "evaluation")
    assert [(row["step"], row["rows"]) for row in evaluated] == [(3, 16), (6, 16), (8, 16)]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fitted = train(tensorboard=tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    drawn = [event.value for event in events.Scalars("step/loss")]
    assert drawn == pytest.approx(fitted.losses, rel=1e-6)


def test_tensorboard_is_an_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        fm.errors.TrainingError, match=r"not installed[^~]*funcmodels\[tensorboard\]"
    ):
        train(tensorboard=tmp_path)


class Loader:
    """Batches in a random order that depends on the state of torch's generator."""

    def __init__(self) -> None:
        self.number = 0

    def __iter__(self) -> Any:
        while True:
            self.number += 1
            yield batch(self.number)

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


class Drawn:
    """Each batch is drawn from torch's own generator: resumed only if that is."""

    def __call__(self, position: int) -> Any:
        return batch(int(torch.randint(0, 1000, ())))


@pytest.mark.parametrize("data", [batch, [batch(i) for i in range(3)], Loader, Drawn()])
def test_resumed_is_uninterrupted(data, tmp_path):
    """The same losses, weights and state, bit for bit; and the log has every step once."""
    make = data if isinstance(data, type) else lambda: data
    torch.manual_seed(0)
    whole = train(9, data=make())
    torch.manual_seed(0)
    settings = {"checkpoints": tmp_path / "run", "save_every": 2, "log": tmp_path / "log.jsonl"}
    first = train(5, data=make(), **settings)
    torch.manual_seed(123)
    second = train(9, data=make(), **settings)
    assert first.losses + second.losses == whole.losses
    assert_same(second.weights, whole.weights)
    assert_same(second.state, whole.state)
    assert [row["loss"] for row in rows(tmp_path / "log.jsonl")] == whole.losses
    assert fm.Checkpoints(tmp_path / "run").steps() == [6, 8, 9]
    assert train(9, data=make(), **settings).losses == []  # it is done


def test_steps_after_the_checkpoint_leave_the_log(tmp_path):
    """A killed run had logged more than it had saved, and half a row."""
    settings = {"checkpoints": tmp_path / "run", "log": tmp_path / "log.jsonl"}
    whole = train(4, **settings)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 5, "loss": 7.0}\n{"kind": "step", "st')
    second = train(6, **settings)
    logged = rows(tmp_path / "log.jsonl")
    assert [row["loss"] for row in logged] == whole.losses + second.losses
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_step_with_a_checkpoint(number, tmp_path):
    def data(position: int) -> Any:
        if position == 3:
            os.kill(os.getpid(), number)
        return batch(position)

    handler = signal.getsignal(number)
    fitted = train(data=data, checkpoints=tmp_path)
    assert signal.getsignal(number) is handler
    assert (fitted.step, fitted.stopped) == (4, number.name)
    assert fm.Checkpoints(tmp_path).steps() == [4]
    assert fitted.losses + train(checkpoints=tmp_path).losses == train().losses


def test_a_second_signal_is_as_always():
    """That is what Python does: a shell's background job has SIGINT ignored from the start."""

    def data(position: int) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return batch(position)

    def impatient(position: int) -> Any:
        data(position)
        return data(position)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(data=impatient)
    finally:
        signal.signal(signal.SIGINT, before)


P = fm.axes(vocab=16, hidden=8)


@fm.block
def inner(p: Any, x: Tensor) -> Tensor:
    return x * p["w"]


@fm.block
def layer(p: Any, x: Tensor) -> Tensor:
    x = inner(p["inner"], x)
    # The square root of a negative number is not a number: so is the test's fault made.
    return x + torch.sqrt(p["scale"]) * 0


def forward(params: Any, tokens: Tensor, positions: Tensor, segment_ids: Tensor | None = None):
    x = ops.embed(tokens, params["embed"])
    for p in params["layers"]:
        x = layer(p, x)
    return ops.unembed(x * torch.sqrt(params["last"]), params["embed"])


LAYER = {"inner": {"w": P("hidden", init="ones")}, "scale": P("hidden", init="ones")}
SQRT = fm.Model(
    "Sqrt",
    config={},
    params={
        "embed": P("vocab hidden"),
        "layers": [LAYER, LAYER, LAYER],
        "last": P("hidden", init="ones"),
    },
    forward=forward,
)


def set_to(path: str, value: float) -> Any:
    weights = fm.init(SQRT, seed=0)
    return fm.tree.map_with_path(
        lambda p, w: torch.full_like(w, value) if p == path else w, weights
    )


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("layers.1.scale", -1.0, r"block layer of layers.1, its call 2\n[^~]*test_fit.py:\d+"),
        ("layers.2.inner.w", 3e38, r"block inner of layers.2.inner.w, its call 3\n"),
        ("last", -1.0, r"what is computed after the last of 6 block calls"),
        ("layers.0.scale", float("nan"), r"the parameter layers.0.scale, before"),
        ("layers.0.scale", 0.0, r"the gradient of layers.0.scale, in the backward pass"),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_named(path, value, said, tmp_path):
    weights = set_to(path, value)
    if value == 3e38:  # too large only when multiplied
        weights["embed"] *= 10
    before = fm.tree.map(torch.clone, weights)
    with pytest.raises(fm.errors.NotFiniteError, match=said) as error:
        fm.fit(SQRT, weights, batch, steps=3, optimizer=fm.optim.sgd(0.1), progress=False,
               checkpoints=tmp_path, donate=True)  # fmt: skip
    assert error.value.step == 0
    assert_same(error.value.batch, batch(0))
    assert_same(fm.tree.map(torch.nan_to_num, weights), fm.tree.map(torch.nan_to_num, before))
    assert fm.Checkpoints(tmp_path).steps() == []


def test_a_step_that_fails_later_leaves_the_last_checkpoint(tmp_path):
    """The rate is so large that the weights are gone in a step or two."""
    settings = {"optimizer": fm.optim.sgd(1e30), "checkpoints": tmp_path, "save_every": 1}
    with pytest.raises(
        fm.errors.NotFiniteError, match=r"at step (\d)[^~]*number \1 of the data"
    ) as error:
        train(**settings)
    assert fm.Checkpoints(tmp_path).latest() == error.value.step > 0


def test_data_that_ends_is_refused():
    with pytest.raises(fm.errors.TrainingError, match="the data ended after 2 batches"):
        train(data=(batch(i) for i in range(2)))


def test_another_model_or_optimiser_is_refused(tmp_path):
    train(2, checkpoints=tmp_path)
    with pytest.raises(
        fm.errors.CheckpointError, match=r"holds \d+ tensors that are not asked for"
    ):
        train(4, checkpoints=tmp_path, optimizer=fm.optim.lion(0.1))
    with pytest.raises(fm.errors.CheckpointError, match="is of another model"):
        fm.fit(SQRT, fm.init(SQRT, seed=0), batch, steps=3, optimizer=fm.optim.sgd(0.1),
               checkpoints=tmp_path)  # fmt: skip
    with pytest.raises(fm.errors.CheckpointError, match="has checkpoints of another run"):
        train(4, checkpoints=tmp_path, resume=False)


def test_checkpoints_of_more_steps_are_refused(tmp_path):
    """Their weights are not those after so many steps; after as many, they are returned."""
    want = train(4, checkpoints=tmp_path)
    (tmp_path / ".step-00000002.deleting").mkdir()  # left by a run that was killed at its end
    with pytest.raises(fm.errors.CheckpointError, match=r"newest of step 4, and steps=2"):
        train(2, checkpoints=tmp_path)
    again = train(4, checkpoints=tmp_path)
    assert (again.step, again.losses) == (4, [])
    assert_same(again.weights, want.weights)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_compiled():
    """The graph alone: inductor takes most of a minute, and benchmarks.train runs it."""
    assert train(compile="aot_eager").losses == pytest.approx(train().losses, rel=1e-4)


def wide(p: Any, x: Tensor) -> Tensor:
    for _ in range(6):  # each keeps its result, unless they are computed again
        x = x + torch.tanh(x * p["w"])
    return x


@pytest.mark.slow
def test_compiled_blocks_are_computed_again():
    """The values that the backward pass is given: fewer with remat, compiled too."""

    def kept(block: Any, **settings: Any) -> tuple[int, float]:
        def forward(params: Any, tokens: Tensor, positions: Tensor, segment_ids: Any = None):
            x = ops.embed(tokens, params["embed"])
            for p in params["layers"]:
                x = block(p, x)
            return ops.unembed(x, params["embed"])

        layers = [{"w": P("hidden", init="ones")} for _ in range(2)]
        model = fm.Model("Wide", {}, {"embed": P("vocab hidden"), "layers": layers}, forward)
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.data_ptr()] = t.nbytes
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            fitted = fm.fit(model, fm.init(model, seed=0), batch, steps=1, progress=False,
                            optimizer=fm.optim.sgd(0.1), **settings)  # fmt: skip
        return sum(sizes.values()), fitted.losses[0]

    compiled = {"compile": "aot_eager"}
    plain, again = kept(fm.block(wide), **compiled), kept(fm.block(remat=True)(wide), **compiled)
    assert again[0] < plain[0] / 2
    assert again[1] == pytest.approx(plain[1])
    assert plain[1] == pytest.approx(kept(fm.block(wide))[1])
