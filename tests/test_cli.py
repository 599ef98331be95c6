"""The command line: each command does its work, and a user's error is short and ends with 1."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

import funcmodels as fm
from compiler import cli, layers, passes
from examples import hello
from tests.tiny_llama import tiny, weights_of

HELLO = "examples.hello:model"


@pytest.fixture
def folder(tmp_path):
    """A saved tiny Llama, without a tokenizer."""
    model = tiny(num_key_value_heads=2)
    fm.save(model, weights_of(model), tmp_path / "tiny")
    return str(tmp_path / "tiny")


def run(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command prints; it must end with 0."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(args))
    assert end.value.code == 0
    return capsys.readouterr().out


def fail(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command complains of; it must end with 1."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(args))
    assert end.value.code == 1
    return capsys.readouterr().err


def test_inspect(folder, capsys):
    out = run(capsys, "inspect", folder, "--tp", "1", "--tp", "2")
    [row] = [line.split() for line in out.splitlines() if "attn.q" in line]
    assert row[:2] == ["layers.*.attn.q", "4×8×32"]
    assert row[-4:] == ["4.1", "kB", "2.05", "kB"]  # two layers of 1024 in bfloat16


def test_inspect_replicated_heads(folder, capsys):
    out = run(capsys, "inspect", folder, "--tp", "4")
    [row] = [line.split() for line in out.splitlines() if "attn.k" in line]
    assert row[-2:] == ["1.02", "kB"]  # one of the two heads, of two layers


@pytest.mark.parametrize("place", ["examples/hello.py:model", HELLO])
def test_emit(place, capsys):
    source = run(capsys, "emit", place)
    names = [n.name for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    assert {"HelloAttention", "HelloModel", "HelloForCausalLM"} <= set(names)


def test_emit_to_a_file(tmp_path, capsys):
    path = tmp_path / "served.py"
    assert run(capsys, "emit", HELLO, "-o", str(path)).strip() == str(path)
    assert path.read_text() == run(capsys, "emit", HELLO)


def test_explain(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = run(capsys, "explain", folder, "--tp", "2", "--device", "h100")
    [row] = [line.split() for line in out.splitlines() if "layers.*.attn.o" in line]
    assert row[1:4] == ["32×4×8", "32×2×8", "1.02"]
    assert "all_reduce" in out
    assert "decoding 1 sequence" in out


def test_explain_to_files(tmp_path, capsys):
    files = tmp_path / "hello.json", tmp_path / "hello.html"
    out = run(
        capsys, "explain", HELLO, "--pp", "2", "--json", str(files[0]), "--html", str(files[1])
    )
    assert out.split() == list(map(str, files))
    assert json.loads(files[0].read_text())["pp"] == 2
    assert "<svg" in files[1].read_text()


def test_explain_refuses(capsys):
    assert "has no experts" in fail(capsys, "explain", HELLO, "--ep", "2")
    assert "no dtype int3" in fail(capsys, "explain", HELLO, "--dtype", "int3")


def test_strict_and_allow(tmp_path, capsys):
    file = tmp_path / "odd.py"
    file.write_text(
        "import funcmodels as fm\nfrom funcmodels import ops\n"
        "P = fm.axes(vocab=64, hidden=16)\n"
        "def forward(p, tokens, positions, segment_ids=None):\n"
        "    w = p['a'] @ p['a'].T\n"
        "    return ops.unembed(ops.embed(tokens, p['e']) @ w, p['e'])\n"
        "params = {'e': P('vocab hidden'), 'a': fm.axes(hidden=16, r=2)('hidden r')}\n"
        "model = fm.Model('Odd', None, params, forward, sharding={'vocab': 'tp'})\n"
    )
    assert "odd.py:5 in forward" in fail(capsys, "emit", f"{file}:model", "--strict")
    run(capsys, "emit", f"{file}:model", "--allow", "forward")


def test_check_a_grid(capsys):
    out = run(capsys, "check", HELLO, "--tp", "2", "--tp", "3", "--pp", "2", "--grid")
    assert out.count("works") == 1
    assert out.count("no:") == 1
    assert "tp=2, pp=2 works" in run(capsys, "check", HELLO, "--tp", "2", "--pp", "2")


def test_check(capsys):
    assert run(capsys, "check", HELLO, "--tp", "4") == "HelloForCausalLM: tp=4 works\n"


def test_check_refuses(capsys):
    error = fail(capsys, "check", HELLO, "--tp", "3")
    assert error.startswith('ShardingError: cannot split axis "heads"')
    assert "fix:" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no model nowhere"),
        ("nowhere.py", "fix:  nowhere.py:model"),
        ("nowhere.py:model", "cannot import nowhere.py"),
        ("examples.nowhere:model", "cannot import examples.nowhere"),
        ("examples.hello:modle", "got:  nothing of that name"),
        ("examples.hello:P", "is no model"),
    ],
)
def test_a_model_that_is_none(name, message, capsys):
    assert message in fail(capsys, "inspect", name)


def test_a_function_that_returns_a_model(tmp_path, capsys):
    file = tmp_path / "made.py"
    file.write_text("from examples import hello\ndef make():\n    return hello.model\n")
    assert "tp=2 works" in run(capsys, "check", f"{file}:make", "--tp", "2")


@pytest.mark.slow
def test_serve_gives_its_options_to_vllm(folder, monkeypatch):
    """The emitted class is served: starting the server is caught, since it never ends."""
    pytest.importorskip("vllm")
    started = []
    monkeypatch.setattr(os, "execv", lambda path, args: started.append(args))
    monkeypatch.setenv("FUNCMODELS_REGISTERED", "{}")
    cli.app(["serve", folder, "--tensor-parallel-size", "2", "--port=9"], standalone_mode=False)
    [args] = started
    assert args[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert args[3:5] == ["--model", folder]
    assert args[5:7] == ["--hf-overrides", '{"architectures": ["FmLlamaForCausalLM"]}']
    assert args[7:] == ["--tensor-parallel-size", "2", "--port=9"]
    assert "FmLlamaForCausalLM" in os.environ["FUNCMODELS_REGISTERED"]


@pytest.mark.parametrize(
    "option", ["--tensor-parallel-size=3", "-tp 3", "--tensor-parallel-size 3"]
)
def test_serve_checks_the_ranks_first(folder, option, monkeypatch, capsys):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("vLLM was started"))
    assert "tp=3" in fail(capsys, "serve", folder, *option.split())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_register_reaches_other_processes(tmp_path):
    env = os.environ | {"FUNCMODELS_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "funcmodels", "register", HELLO]
    said = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert "HelloForCausalLM is registered" in said.stdout
    code = (
        "from compiler.vllm_plugin import register; register()\n"
        "from vllm import ModelRegistry\n"
        "assert 'HelloForCausalLM' in ModelRegistry.get_supported_archs()"
    )
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


@pytest.mark.slow
def test_verify(folder, capsys):
    out = run(capsys, "verify", folder, "--prompt", "1, 5 3")
    assert re.search(r"tp=1, \d+ steps equal the function on 3 tokens", out)
    out = run(capsys, "verify", HELLO, "--tp", "1", "--tp", "2")
    assert "HelloForCausalLM: tp=1, " in out
    assert "HelloForCausalLM: tp=2, " in out


def test_verify_names_what_differs(capsys, monkeypatch):
    """A pass that scales what it should not is found, and ends with 1."""

    def scaled(program):
        for block in program.all():
            for node in block.graph.nodes:
                if node.target is layers.attention:
                    node.kwargs = {**node.kwargs, "scale": 0.5}
        return program

    monkeypatch.setattr(passes, "PIPELINE", (*passes.PIPELINE, scaled))
    error = fail(capsys, "verify", HELLO)
    assert "HelloForCausalLM computes something else than its function" in error
    assert "attention(...)" in error


@pytest.mark.parametrize("prompt", ["1 a", "1 9999", " "])
def test_verify_refuses_what_are_no_tokens(prompt, capsys):
    assert "is no token id" in fail(capsys, "verify", HELLO, "--prompt", prompt)


def test_generate_without_a_checkpoint_says_so(tmp_path, capsys):
    assert "no config.json" in fail(capsys, "generate", str(tmp_path), "Hello")


def test_hello_is_what_the_commands_found():
    assert cli.find_model(HELLO) is hello.model
