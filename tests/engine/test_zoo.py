"""Every model of the zoo on the real engine equals the pure function, and vLLM's own class.

The rows are those of tests/models/rows. What a row runs on one rank, it runs in one forked child,
when the first of its tests asks for it: variations in small pieces of prompts (chunked prefill),
vLLM's own class, and a class with a planted fault. On two ranks prompts run whole.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import funcmodels as fm
from compiler.vllm_target import load_source
from tests.engine.harness import Served, generate, make_llm, run_in_engine
from tests.engine.test_lora import OPTIONS as LORA
from tests.engine.test_pooling import ask, wanted
from tests.engine.test_shared_tensors import quantised, write_adapter
from tests.engine.test_spawned import add_tokenizer
from tests.engine.test_traps import vllms_layers
from tests.engine.tiny import PROMPTS, Expected, check, distance, expected, register
from tests.models.zoo import Row, rows

ROWS = rows()
SERVED = [(name, v) for name, row in ROWS.items() for v in ("", *row.served)]
OWN = [name for name, row in ROWS.items() if row.vllm]
ADAPTED = [name for name, row in ROWS.items() if row.linears]
IN_INT8 = [name for name, row in ROWS.items() if not row.no_int8]
# What vLLM's own class of a row needs to be right. LFM2's hands the CPU's kernel of ropes three
# dims, of which it makes other values, without an error: log probabilities are off by up to a nat.
OWN_SETTINGS = {"lfm2": {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}}
PIECES = {"max_num_seqs": 4, "max_num_batched_tokens": 32}  # the longest prompt in three or more

Answer = list[Served] | torch.Tensor  # of a model that generates, and of one that pools
Answers = dict[str, Answer | str]  # of each run, or the traceback of its failure


class Runs:
    """What was asked of the engine already, and where the folders of the models are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[str, Answers] = {}
        self.wanted: dict[str, Expected | torch.Tensor] = {}

    def saved(self, name: str, variation: str = "") -> tuple[fm.Model, Path]:
        """A variation, in a folder; what the pure function answers is kept in `wanted`."""
        model, folder = ROWS[name].model(variation), self.folder / f"{name}-{variation}"
        if not folder.exists():
            weights = ROWS[name].weights(model)
            fm.save(model, weights, folder)
            add_tokenizer(folder)  # vLLM wants one where a model pools
            self.wanted[f"{name}-{variation}"] = oracle(model)(model, weights)
        return model, folder

    def want(self, name: str, variation: str = "") -> Expected | torch.Tensor:
        self.saved(name, variation)
        return self.wanted[f"{name}-{variation}"]

    def adapted(self, name: str) -> None:
        """An adapter for a row's matrices, beside the folders."""
        row, model = ROWS[name], ROWS[name].model()
        folder = self.folder / f"{name}-adapter"
        merged = write_adapter(folder, model, row.weights(model), row.linears, row.is_transposed)
        self.wanted[f"{name}-adapter"] = oracle(model)(model, merged)

    def quantised(self, name: str) -> None:
        """A checkpoint of a row's matrices in int8, in which rounding turns no choice."""
        row = ROWS[name]
        model, folder = row.model(**row.no_choice), self.folder / f"{name}-int8"
        weights = row.weights(model)
        fm.save(model, weights, folder)
        quantised(model, weights, folder, "int8", row.unquantised)
        add_tokenizer(folder)
        self.wanted[f"{name}-wide"] = oracle(model)(model, weights)

    def alone(self, name: str) -> Answers:
        """Every run of a row on one rank: by variation, and those that `run_all` names."""
        if name not in self.answers:
            row = ROWS[name]
            folders = {v: self.saved(name, v) for v in ("", *row.served)}
            if row.linears:
                self.adapted(name)
            if not row.no_int8:
                self.quantised(name)
            self.answers[name] = run_in_engine(lambda: run_all(row, folders), timeout=200)
        return self.answers[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("zoo"))


def oracle(model: fm.Model) -> Callable[[fm.Model, Any], Any]:
    """What gives the pure function's answers to the prompts."""
    return expected if model.task == "generate" else wanted


def run_all(row: Row, folders: dict[str, tuple[fm.Model, Path]]) -> Answers:
    """In the engine's process: one engine after the other."""
    model, folder = folders[""]
    todo: dict[str, Callable[[], Any]] = {
        variation: lambda of=of: (register(of[0]), of[1], None)[1:]
        for variation, of in folders.items()
    }
    if row.vllm:
        todo["vllm"] = lambda: (folder, own_class(row))
    todo["fault"] = lambda: (folder, faulty_class(row, model))
    if row.linears:
        todo["adapter"] = todo[""]
    if not row.no_int8:
        int8 = folder.with_name(f"{folder.name}int8")
        todo["int8"] = lambda: (int8, with_vllms_layers(fm.load_model(int8)))
        todo["int8 vllm"] = lambda: (int8, own_class(row))
    answers: Answers = {}
    for run, prepare in todo.items():
        try:
            path, cls = prepare()
            settings = own_settings(row, model) if run.endswith("vllm") else {}
            if run == "adapter":
                settings = LORA | {"adapter": folder.with_name(f"{folder.name}adapter")}
            answers[run] = answer(row, model, path, model_cls=cls, **settings)
        except Exception:
            answers[run] = traceback.format_exc()
    return answers


def answer(
    row: Row, model: fm.Model, folder: Path, adapter: Path | None = None, **settings: Any
) -> Answer:
    """Of a small engine to all prompts, on one rank in pieces."""
    pieces = {} if "tp" in settings or model.task != "generate" else PIECES
    pools = {"skip_tokenizer_init": False} if model.task != "generate" else {}
    llm = make_llm(folder, **{**pieces, **pools, **row.settings, **settings})
    if model.task != "generate":
        return ask(llm, adapter=adapter)
    if adapter is not None:  # beside adapters, vLLM has no prompt logprobs on a CPU
        return generate(llm, PROMPTS, adapters=[adapter] * len(PROMPTS))
    return generate(llm, PROMPTS, prompt_logprobs=True)


def own_settings(row: Row, model: fm.Model) -> dict[str, Any]:
    """What vLLM's own class must be told, as of a model that pools."""
    if model.pooling is None:
        return OWN_SETTINGS.get(row.module, {})
    activation = {"embed": "embed", "classify": "classify"}[model.task]
    pooler = {"seq_pooling_type": model.pooling.upper(), "use_activation": model.normalize}
    return {"runner": "pooling", "convert": activation, "pooler_config": pooler}


def own_class(row: Row) -> type:
    """vLLM's. A class, not its name, which would be inspected in a process of its own."""
    module, _, name = str(row.vllm or row.narrow_vllm).partition(":")
    return getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)


def faulty_class(row: Row, model: fm.Model) -> type:
    """The emitted class with the row's fault."""
    source = fm.compile_to_vllm(model).source
    edited, count = re.subn(*row.engine_fault, source)
    assert count, "the fault was not planted"
    return load_source(edited, model.name)


def with_vllms_layers(model: fm.Model) -> type:
    """Of a model, with vLLM's norms and activations: a last bit turns an int8 now and then."""
    return load_source(vllms_layers(fm.compile_to_vllm(model).source), model.name)


def answered(answers: Answers, run: str) -> Any:
    found = answers[run]
    assert not isinstance(found, str), found
    return found


def as_wanted(theirs: Answer) -> Expected | torch.Tensor:
    """An answer as one to be compared with."""
    if isinstance(theirs, torch.Tensor):
        return theirs
    return [(s.tokens, torch.tensor(s.all_logprobs)) for s in theirs]


def same(got: Any, want: Any, tolerance: float = 3e-5) -> None:
    """Tokens equal, log probabilities or vectors within the tolerance."""
    if isinstance(want, torch.Tensor):
        return torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    return check(got, want, tolerance)


def apart(got: Any, want: Any) -> float:
    """The largest difference."""
    is_tensor = isinstance(want, torch.Tensor)
    return (got - want).abs().max().item() if is_tensor else distance(got, want)


@pytest.mark.parametrize(("name", "variation"), SERVED)
def test_equals_the_pure_function(name, variation, runs):
    same(answered(runs.alone(name), variation), runs.want(name, variation))


# In bfloat16, the engine's error by the pure function's: of few numbers, chance by a tenth or two.
NOISE = 1.3


BFLOAT16 = ["bert", "qwen3", "qwen3_moe", "mamba2", "lfm2", "granite_moe_hybrid", "qwen3_next"]


@pytest.mark.parametrize("name", BFLOAT16)
def test_in_bfloat16(name, tmp_path):
    """An encoder, a dense model, a mixture and states, as near to float32 as the pure function is.

    The pure function with the same weights in float32 is right, over all prompts and answers. A
    greedy token may be another than its only where it has both nearly alike. So is vLLM's own class
    where that takes bfloat16 alone.
    """
    row = ROWS[name]
    model = row.model(**row.no_choice)
    weights = row.weights(model, torch.bfloat16)
    fm.save(model, weights, tmp_path)
    add_tokenizer(tmp_path)

    def run() -> list[Answer]:
        register(model)
        classes = [None, faulty_class(row, model), *([own_class(row)] if row.narrow_vllm else [])]
        return [answer(row, model, tmp_path, model_cls=c, dtype="bfloat16") for c in classes]

    good, faulty, *own = run_in_engine(run)
    exact = fm.tree.map(torch.Tensor.float, weights)
    assert excess(model, exact, weights, good) < NOISE
    assert excess(model, exact, weights, faulty) > NOISE
    assert all(excess(model, exact, weights, answer) < NOISE for answer in own)


def excess(model: fm.Model, exact: Any, weights: Any, got: Answer) -> float:
    """The engine's error by the pure function's; infinite where a greedy token is no near-tie."""
    if isinstance(got, torch.Tensor):
        right, pure = (fm.embed(model, w, PROMPTS) for w in (exact, weights))
        return float((got - right).norm() / (pure - right).norm())
    full = [[*p, *s.tokens] for p, s in zip(PROMPTS, got, strict=True)]
    right, pure = (torch.cat(fm.logprobs(model, w, full)) for w in (exact, weights))
    ours = torch.cat([torch.tensor(s.all_logprobs) for s in got])
    noise = (pure - right).square().mean().sqrt()
    assert noise < 0.05, "noise that hides a fault"
    for s, tokens in zip(got, full, strict=True):
        logits = model.forward(exact, torch.tensor(tokens), torch.arange(len(tokens)))
        best = logits.log_softmax(-1).amax(-1)[-len(s.tokens) - 1 : -1]
        chosen = fm.logprobs(model, exact, tokens)[-len(s.tokens) :]
        if (best - chosen).max() > 6 * noise:
            return float("inf")
    return float((ours - right).square().mean().sqrt() / noise)


@pytest.mark.parametrize("name", ROWS)
def test_on_two_ranks(name, runs):
    """Traced as one graph by Dynamo, whose result runs eagerly: the class can be compiled."""
    row = ROWS[name]
    model, folder = runs.saved(name)

    def run() -> Answer:
        register(model)
        return answer(row, model, folder, tp=2, compiled="trace")

    same(run_in_engine(run, compiled="trace"), runs.want(name))


@pytest.mark.parametrize("name", ROWS)
def test_on_two_stages(name, runs):
    """Half of the layers on each rank."""
    row = ROWS[name]
    model, folder = runs.saved(name)
    stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}

    def run() -> Answer:
        register(model)
        return answer(row, model, folder, **stages)

    same(run_in_engine(run), runs.want(name))


@pytest.mark.parametrize("name", OWN)
def test_equals_vllms_own_class(name, runs):
    answers = runs.alone(name)
    same(answered(answers, ""), as_wanted(answered(answers, "vllm")), ROWS[name].tolerance)


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_equals_merged_weights(name, runs):
    answers = runs.alone(name)
    same(answered(answers, "adapter"), runs.wanted[f"{name}-adapter"])
    assert apart(answered(answers, "adapter"), runs.want(name)) > 1e-3


@pytest.mark.parametrize("name", IN_INT8)
def test_in_int8_it_equals_vllms_own_class(name, runs):
    answers = runs.alone(name)
    same(answered(answers, "int8"), as_wanted(answered(answers, "int8 vllm")))
    assert apart(answered(answers, "int8"), runs.wanted[f"{name}-wide"]) > 1e-4


@pytest.mark.parametrize("name", ROWS)
def test_a_planted_fault_is_seen(name, runs):
    """A small fault in the emitted source is far outside the tolerance."""
    assert apart(answered(runs.alone(name), "fault"), runs.want(name)) > 1e-3


@pytest.mark.parametrize(
    "other", [{"sliding_window": 25}, {"rope_theta": 9e5}], ids=["window", "base"]
)
def test_a_folder_of_another_config_is_refused(other, runs, tmp_path):
    """A window, and a base of rope where each type of layer has its own, are part of the model."""
    shutil.copytree(runs.saved("gemma3")[1], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | other))

    def run() -> None:
        register(ROWS["gemma3"].model())
        make_llm(tmp_path)

    with pytest.raises(ValueError, match=rf"another config.json\n.*{next(iter(other))}"):
        run_in_engine(run)


OTHERS = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "gpt2": {"n_head": 2},
    "gpt_neox": {"use_parallel_residual": False},
    "phi3": {"partial_rotary_factor": 0.75},
    "smollm3": {"use_sliding_window": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_field_that_only_this_model_has_is_part_of_it(name, runs, tmp_path):
    """Also one that its config.json leaves out, for which it has a default."""
    shutil.copytree(runs.saved(name)[1], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | OTHERS[name]))

    def run() -> None:
        register(ROWS[name].model())
        make_llm(tmp_path)

    with pytest.raises(ValueError, match=rf"another config.json\n.*{next(iter(OTHERS[name]))}"):
        run_in_engine(run)
