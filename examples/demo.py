"""The whole way on SmolLM2-135M-Instruct: inspect, compile, serve, compare, fine-tune, serve.

    make demo                        # sets up what it needs, and prints how long each part took
    python -m examples.demo --quick  # the same with two of the thirty layers: it says nonsense

Every step prints what it did and how long it took. What it writes goes to examples/out/demo.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

import funcmodels as fm
from compiler.summary import parameter_table
from examples import finetune
from examples.engine import Answer, ask, engine
from examples.smollm2 import convert
from funcmodels.models import llama

OUT = Path(__file__).parent / "out" / "demo"
QUESTIONS = [
    "Who are you?",
    "Why is the sky blue?",
    "What should I do when I am lost at sea?",
]

# On a descriptor of its own, so that it can still speak while the engine's output goes to a file.
console = Console(file=os.fdopen(os.dup(1), "w"), highlight=False)
times: dict[str, float] = {}


@contextlib.contextmanager
def stage(title: str) -> Iterator[None]:
    """A titled and timed part of the demo."""
    console.rule(f"[bold]{len(times) + 1}. {title}", align="left")
    start = time.perf_counter()
    yield
    times[title] = time.perf_counter() - start
    console.print(f"[dim]{times[title]:.1f} s\n")


# --- the stages ----------------------------------------------------------------------------------


def inspect(folder: Path) -> fm.Model:
    """The parameter tree."""
    with stage("The model: a pytree of declarations and a pure function"):
        model = fm.load_model(folder)
        console.print(parameter_table(model, tp=(1, 3)))
    return model


def compile_and_register(model: fm.Model) -> str:
    """The emitted class, known to vLLM in every process; returns its name."""
    with stage("Compile to a vLLM class, and register it"):
        with console.status("tracing, partitioning, fusing, emitting"):
            served: Any = fm.compile_to_vllm(model)
        name = fm.register(model)
        lines = served.source.splitlines()
        console.print(f"{name}: {len(lines)} lines of Python, in\n  {served.source_file}")
        start = next(i for i, line in enumerate(lines) if re.match("class .*Attention", line))
        forward = next(i for i in range(start, len(lines)) if "def forward" in lines[i])
        end = next(i for i in range(forward, len(lines)) if not lines[i].strip())
        console.print(f"\nHow {lines[start][6:].partition('(')[0]} computes:")
        console.print(Syntax("\n".join(lines[forward:end]), "python", background_color="default"))
    return name


def serve(folder: Path, name: str, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """The emitted class in vLLM, on the untouched folder, which names vLLM's own Llama."""
    with stage("Serve it with vLLM, one rank, float32"):
        log = OUT / "engine.log"
        settings = {"dtype": "float32", "hf_overrides": {"architectures": [name]}}
        with contextlib.ExitStack() as stack:
            with console.status(f"starting the engine; its output goes to {log}"):
                llm = stack.enter_context(engine(folder, log=log, **settings))
            with console.status("generating"):
                return ask(llm, prompts, max_tokens=max_tokens)


def compare(model: fm.Model, folder: Path, weights: Any, answers: list[Answer], eos: int) -> None:
    """The engine's tokens and log-probabilities against the pure function's and transformers'."""
    with stage("Compare with the pure function and with transformers, float32"):
        prompts, count = [a.prompt for a in answers], max(len(a.tokens) for a in answers)
        with console.status("the pure function, without a cache: every token runs the whole text"):
            ours = fm.generate(model, weights, prompts, max_new_tokens=count, eos=eos)
            our_logprobs = [fm.logprobs(model, weights, a.prompt + a.tokens) for a in answers]
        with console.status("transformers"):
            theirs, their_logprobs = run_transformers(folder, answers, count)
        table = Table("prompt", "compared with", "greedy tokens", "max |Δ logprob|", "mean")
        for i, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
            served = torch.tensor(answer.logprobs)
            for who, tokens, logprobs in (
                ("pure function", ours[i], our_logprobs[i]),
                ("transformers", theirs[i], their_logprobs[i]),
            ):
                same = sum(a == b for a, b in zip(tokens, answer.tokens, strict=False))
                delta = (served - logprobs).abs()
                equal = f"{same} of {len(answer.tokens)} equal"
                table.add_row(question, who, equal, f"{delta.max():.1e}", f"{delta.mean():.1e}")
                question = ""
        console.print(table)


def run_transformers(
    folder: Path, answers: list[Answer], count: int
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy tokens of `transformers`, and its log-probabilities of the engine's answers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # The folder's own name for the architecture, or its second name where fm.save wrote it.
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, logprobs = [], []
    with torch.no_grad():
        for answer in answers:
            prompt = torch.tensor([answer.prompt])
            ones = torch.ones_like(prompt)
            out = peer.generate(prompt, attention_mask=ones, max_new_tokens=count, do_sample=False)
            tokens.append(out[0, len(answer.prompt) :].tolist())
            text = torch.tensor([answer.prompt + answer.tokens])
            every = peer(text).logits[0, :-1].log_softmax(-1)
            logprobs.append(every.gather(-1, text[0, 1:, None])[:, 0])
    return tokens, logprobs


def tune(model: fm.Model, weights: Any, tokenizer: Any, steps: int, seq: int) -> Any:
    """New weights, taught to answer as a lighthouse keeper."""
    with stage(f"Fine-tune {steps} steps with fm.fit"):
        chats = finetune.conversations(finetune.TEXT.read_text())
        documents = [tokenizer.apply_chat_template(chat)["input_ids"] for chat in chats]
        packed = fm.pack(documents, seq)
        rows, used = len(packed["tokens"]), float((packed["segment_ids"] >= 0).float().mean())
        console.print(
            f"{len(documents)} conversations from {finetune.TEXT.name}, packed into {rows} rows of "
            f"{seq} tokens, {used:.0%} used; no document sees another"
        )
        data = finetune.batches(packed, rows=1, seed=0)
        weights, losses = finetune.train(
            model, weights, data, steps=steps, lr=2e-4, console=console
        )
        finetune.plot_losses(losses, OUT / "loss.png", f"{model.name}: {finetune.TEXT.stem}")
        part = max(1, len(losses) // 5)
        first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
        console.print(f"loss {first:.3f} -> {last:.3f} (mean of {part} steps); {OUT / 'loss.png'}")
    return weights


def save_and_check(model: fm.Model, weights: Any, like: Path) -> Path:
    """The tuned model as a folder; and what a number of ranks that cannot work is answered."""
    folder = OUT / "tuned"
    with stage("Save, and ask for two ranks: 9 heads cannot be halved"):
        fm.save(model, fm.tree.map(lambda w: w.to(torch.bfloat16), weights), folder, like=like)
        console.print(f"saved to {folder}\n\nfm.check(model, tp=2) answers, with nothing loaded:\n")
        try:
            fm.check(model, tp=2)
        except fm.errors.ShardingError as error:
            console.print(f"[red]{error}", markup=True)
        console.print("\nLLM(folder, tensor_parallel_size=2) refuses it as well:\n")
        try:
            with engine(folder, log=OUT / "engine.log", tensor_parallel_size=2):
                raise AssertionError("vLLM took two ranks")
        except ValueError as error:
            said = [line.strip() for line in str(error).splitlines() if "divisible" in line]
            console.print(f"[red]{(said or [str(error)])[0].partition(' [')[0]}")
    return folder


def serve_tuned(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """Three ranks, each with three heads and one KV head."""
    with stage("Serve the tuned weights on three ranks, bfloat16"):
        log = OUT / "engine.log"
        with contextlib.ExitStack() as stack:
            with console.status(f"starting three workers; their output goes to {log}"):
                llm = stack.enter_context(
                    engine(folder, log=log, dtype="bfloat16", tensor_parallel_size=3)
                )
            with console.status("generating"):
                return ask(llm, prompts, max_tokens=max_tokens)


def show_change(tokenizer: Any, before: list[Answer], after: list[Answer]) -> None:
    """What each prompt was answered before and after."""
    with stage("What changed"):
        table = Table("prompt", "before", "after", show_lines=True)
        for question, old, new in zip(QUESTIONS, before, after, strict=True):
            texts = (tokenizer.decode(a.tokens, skip_special_tokens=True) for a in (old, new))
            table.add_row(question, *(text.strip() for text in texts))
        console.print(table)


# --- all of them ---------------------------------------------------------------------------------


def first_layers(folder: Path, count: int) -> Path:
    """A folder with the first layers of a model only."""
    whole, dest = fm.load_model(folder), OUT / f"first-{count}-layers"
    config = replace(whole.config, num_hidden_layers=count)
    weights = fm.load(whole, folder)
    cut = {**weights, "layers": weights["layers"][:count]}
    fm.save(llama.model(config), cut, dest, like=folder)
    return dest


def main(
    quick: Annotated[bool, typer.Option(help="two layers and a few steps: for tests")] = False,
    steps: Annotated[int, typer.Option(help="of fine-tuning")] = 32,
) -> None:
    """Inspect, compile, serve, compare, fine-tune, and serve again SmolLM2-135M-Instruct."""
    from transformers import AutoTokenizer

    os.environ.update(
        HF_HUB_OFFLINE="1",  # everything is here already
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # three ranks may run on two cores
    )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "engine.log").write_text("")
    folder = convert()
    seq, max_tokens = 256, 40
    if quick:
        folder, steps, seq, max_tokens = first_layers(folder, 2), 4, 128, 8
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        for chat in chats
    ]

    model = inspect(folder)
    name = compile_and_register(model)
    before = serve(folder, name, prompts, max_tokens)
    weights = fm.load(model, folder, dtype=torch.float32)
    compare(model, folder, weights, before, tokenizer.eos_token_id)
    weights = tune(model, weights, tokenizer, steps, seq)
    tuned = save_and_check(model, weights, like=folder)
    after = serve_tuned(tuned, prompts, max_tokens)
    show_change(tokenizer, before, after)

    table = Table("stage", "seconds")
    for title, seconds in times.items():
        table.add_row(title, f"{seconds:.1f}")
    table.add_row("all", f"{sum(times.values()):.1f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
