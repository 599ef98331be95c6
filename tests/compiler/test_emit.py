"""The emitted file: Python that stands alone, the same every time, and kept as a golden text."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import einsum
from hypothesis import HealthCheck, given, settings

import funcmodels as fm
from compiler.emit import expressions
from compiler.emit.helpers import FILES, helpers
from compiler.emit.scope import IMPORTS
from compiler.vllm_target import source_for_vllm
from funcmodels import ops
from funcmodels.errors import LoweringError
from tests.compiler.programs import TABLE, axes, small
from tests.compiler.random_programs import Spec, model_of, specs
from tests.engine.test_value_residual import model as value_residual
from tests.models.zoo import rows
from tests.tiny_llama import tiny

ALLOWED = {"torch", "vllm", "einops", "safetensors", "re", "itertools", "collections", "__future__"}
P = axes()


# Models as users write them


def designed() -> fm.Model:
    """DESIGN's first page: norms and residuals inside two blocks."""

    @fm.block
    def attention(p, x, positions, segment_ids):
        h = ops.rms_norm(x, p["norm"], eps=1e-5)
        q = einsum(h, p["q"], "... e, h d e -> ... h d")
        k = einsum(h, p["k"], "... e, h d e -> ... h d")
        v = einsum(h, p["v"], "... e, h d e -> ... h d")
        q, k = ops.rope(q, k, positions, theta=10000.0)
        o = ops.attention(q, k, v, segment_ids=segment_ids)
        return x + einsum(o, p["o"], "... h d, e h d -> ... e")

    @fm.block
    def mlp(p, x):
        h = ops.rms_norm(x, p["norm"], eps=1e-5)
        gate, up = (einsum(h, p[name], "... e, f e -> ... f") for name in ("gate", "up"))
        return x + einsum(ops.swiglu(gate, up), p["down"], "... f, e f -> ... e")

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for p in params["layers"]:
            x = attention(p["attn"], x, positions, segment_ids)
            x = mlp(p["mlp"], x)
        return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-5), params["head"])

    layer = {
        "attn": {
            "norm": P("hidden", init="ones"),
            "q": P("heads head_dim hidden"),
            "k": P("kv_heads head_dim hidden"),
            "v": P("kv_heads head_dim hidden"),
            "o": P("hidden heads head_dim"),
        },
        "mlp": {
            "norm": P("hidden", init="ones"),
            "gate": P("mlp hidden"),
            "up": P("mlp hidden"),
            "down": P("hidden mlp"),
        },
    }
    params = {"layers": [layer] * 3, "norm": P("hidden", init="ones")}
    return small(forward, params, TABLE, name="DesignedModel")


def custom() -> fm.Model:
    """What no layer of the engine's is: bare parameters, a scalar, low rank, a softcap, layouts."""
    at = "blocks.{layers}"

    @fm.block
    def block(p, x, factor):
        h = x * torch.sigmoid(p["mix"]) * p["scale"]
        h = (h @ p["a"]) @ p["b"]
        return x + torch.tanh(h) * factor

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for i, p in enumerate(params["layers"]):
            x = block(p, x, 1.0 if i % 2 else 0.5)
        logits = ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-5), params["head"])
        return 30.0 * torch.tanh(logits / 30.0)

    layer = {
        "mix": P("hidden"),
        "scale": P("", init="ones"),
        "a": P("hidden heads", hf=f"{at}.a.weight: heads hidden"),
        "b": P("heads hidden", hf=f"{at}.b.weight: hidden heads"),
    }
    params = {"layers": [layer] * 4, "norm": P("hidden", init="ones")}
    return small(forward, params, {"vocab": "tp"}, name="CustomModel")


def transposed() -> fm.Model:
    """A checkpoint that stores matrices as (in, out), as GPT-2's."""
    at = "h.{layers}"

    @fm.block
    def mlp(p, x):
        h = torch.relu(torch.nn.functional.linear(x, p["up"], p["up_bias"]))
        return x + torch.nn.functional.linear(h, p["down"])

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        for p in params["layers"]:
            x = mlp(p, x)
        return ops.unembed(x, params["head"])

    layer = {
        "up": P("mlp hidden", hf=f"{at}.c_fc.weight: hidden mlp"),
        "up_bias": P("mlp", hf=f"{at}.c_fc.bias"),
        "down": P("hidden mlp", hf=f"{at}.c_proj.weight: mlp hidden"),
    }
    return small(forward, {"layers": [layer] * 2}, TABLE, name="TransposedModel")


def unrolled() -> fm.Model:
    """The embedding added before each layer: no loop of equal steps."""

    @fm.block
    def block(p, x):
        return x + ops.rms_norm(x, p["norm"], eps=1e-5) @ p["up"].T @ p["down"].T

    def forward(params, tokens, positions, segment_ids=None):
        first = x = ops.embed(tokens, params["embed"])
        for p in params["layers"]:
            x = block(p, x + first)
        return ops.unembed(x, params["head"])

    layer = {"norm": P("hidden"), "up": P("mlp hidden"), "down": P("hidden mlp")}
    return small(forward, {"layers": [layer] * 3}, TABLE, name="UnrolledModel")


MODELS: dict[str, Callable[[], fm.Model]] = {
    "llama": tiny,
    "llama_tied": functools.partial(tiny, tie_word_embeddings=True),
    "llama_bias": functools.partial(tiny, attention_bias=True, mlp_bias=True),
    "llama_mqa": functools.partial(tiny, num_key_value_heads=1),
    "designed": designed,
    "custom": custom,
    "transposed": transposed,
    "unrolled": unrolled,
    "value_residual": lambda: value_residual,
    "glm4_moe": lambda: rows()["glm4_moe"].model(),
    "gemma3": lambda: rows()["gemma3"].model(),
    "deepseek_v3": lambda: rows()["deepseek_v3"].model(),
}


@functools.cache
def source(name: str) -> str:
    return source_for_vllm(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_golden(name, golden):
    golden(f"{name}.py.txt", source(name))


def test_a_text_that_is_not_python_is_not_given(monkeypatch):
    model = small(
        lambda p, t, s, segment_ids=None: ops.unembed(
            torch.neg(ops.embed(t, p["embed"])), p["head"]
        )
    )
    monkeypatch.setitem(expressions._SPECIAL, torch.neg, lambda scope, node: "f(a=1, a=2)")
    with pytest.raises(LoweringError, match=r"what is written for .* is not Python") as error:
        source_for_vllm(model)
    assert "keyword argument repeated: a" in error.value.lines["got"]


@pytest.mark.parametrize("name", MODELS)
def test_is_deterministic(name):
    assert source_for_vllm(MODELS[name]()) == source(name)


@pytest.mark.slow
def test_is_the_same_in_another_process_which_does_not_import_vllm():
    """No order of a set, no id, no hash reaches the text."""
    script = (
        "import sys; from compiler.vllm_target import source_for_vllm; "
        "from tests.tiny_llama import tiny; print(source_for_vllm(tiny()), end=''); "
        "found = [m for m in sys.modules if m.split('.')[0] == 'vllm']; assert not found, found"
    )
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    found = run([sys.executable, "-c", script], env={"PYTHONHASHSEED": "7", "PYTHONPATH": "."})
    assert found.stdout == source("llama")


@pytest.mark.parametrize("name", MODELS)
def test_imports(name):
    """torch, vLLM, what it needs, and the standard library: never the compiler or funcmodels."""
    found = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add((node.module or "").split(".")[0])
    assert found <= ALLOWED


@pytest.mark.parametrize("name", MODELS)
def test_every_import_is_used_and_every_name_defined(name, tmp_path):
    file = tmp_path / "emitted.py"
    file.write_text(source(name))
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", MODELS)
def test_is_formatted(name, tmp_path):
    file = tmp_path / "emitted.py"
    own = re.split(r"^def ", source(name), maxsplit=1, flags=re.MULTILINE)[0]  # not the runtime's
    for helper in helpers().values():
        if helper.lines[0].startswith("class "):
            own = own.replace("\n".join([*helper.lines, "", "", ""]), "")
    file.write_text(own.rstrip() + "\n")
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--diff", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_helpers_import_can_be_imported():
    """Imports of emitted files are found by the names that their helpers read."""
    trees = [ast.parse((Path("compiler") / file).read_text()) for file in FILES]
    nodes = [node for tree in trees for node in tree.body]
    imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {a.asname or a.name for n in imports for a in n.names} - {"annotations"}
    assert names <= IMPORTS.keys() | helpers().keys()


def test_variables_leave_helpers_and_imports_alone():
    @fm.block
    def scaled(p, x):
        normed = x * p["gain"]
        product = ops.rms_norm(normed, p["gain"] + 1.0, eps=1e-5)
        return product + 1.0

    def forward(params, tokens, positions, segment_ids=None):
        x = scaled(params["own"], ops.embed(tokens, params["embed"]))
        return ops.unembed(x, params["head"])

    text = source_for_vllm(small(forward, {"own": {"gain": axes()("hidden")}}))
    assert "product_2 = normed(normed_2, " in text


@pytest.mark.parametrize("name", MODELS)
def test_names_no_path(name):
    text = source(name)
    assert "/work" not in text
    assert "/home" not in text
    assert not re.search(r"[A-Za-z]:\\", text)


def test_one_class_a_block():
    classes = re.findall(r"^class (FmLlama\w+)", source("llama"), re.MULTILINE)
    assert classes == [
        "FmLlamaAttention",
        "FmLlamaMlp",
        "FmLlamaDecoderLayer",
        "FmLlamaModel",
        "FmLlamaForCausalLM",
    ]


def test_depth_does_not_change_the_text():
    """Of a deeper model only the number of layers, and of parameters, is another."""
    shallow, deep = (
        source_for_vllm(tiny(num_hidden_layers=2)),
        source_for_vllm(tiny(num_hidden_layers=9)),
    )
    differing = [
        (a, b) for a, b in zip(shallow.splitlines(), deep.splitlines(), strict=True) if a != b
    ]
    assert len(differing) <= 3, differing


# Random programs


@given(specs())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def random_sources(spec: Spec) -> None:
    random = model_of(spec)
    try:
        text = source_for_vllm(random)
    except LoweringError as error:
        refused.append((error.what, error.lines["fix"]))
        return
    compile(text, "random.py", "exec")
    assert source_for_vllm(random) == text
    emitted.append(text)


emitted: list[str] = []
refused: list[tuple[str, str]] = []


@pytest.mark.slow
def test_random_sources(capsys):
    random_sources()
    with capsys.disabled():
        print(f"\n  random sources: {len(emitted)} emitted, {len(refused)} refused")
    assert len(emitted) >= 10
    assert all(fix for _, fix in refused)


def test_a_parameter_that_is_read_twice_is_no_layers():
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        x = x + (x @ params["up"].T) @ params["up"]
        x = x * params["up"].mean(0)
        return ops.unembed(x, params["head"])

    text = source_for_vllm(small(forward, {"up": P("mlp hidden")}, {}))
    assert "self.up = nn.Parameter(torch.empty(MLP, HIDDEN), requires_grad=False)" in text
    assert "Linear(" not in text.split("class SmallModel")[1].split("class ")[0]


@pytest.mark.parametrize("kind", ["no head", "late read"])
def test_no_unembedding(kind):
    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        if kind == "no head":
            return torch.cat((x, x), -1)
        return ops.unembed(x * 2, params["head"]) + x.sum(-1, keepdim=True)

    with pytest.raises(LoweringError) as error:
        source_for_vllm(small(forward))
    assert "unembed" in error.value.what
    assert error.value.lines["fix"]


def listed(steps: Callable[..., Any], *layers: dict[str, Any], **params: fm.Param) -> str:
    """The constructor of a model's body whose forward is `steps` over some layers."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        return ops.unembed(steps(params, x), params["head"])

    source = source_for_vllm(small(forward, {"layers": list(layers), **params}, TABLE))
    compile(source, "emitted.py", "exec")
    return source[source.index("class SmallModel(") : source.index("def embed_input_ids")]


MLP = {"up": P("mlp hidden"), "down": P("hidden mlp")}


@fm.block
def powered(p, x, power, gain=1.0):
    return x + gain * (x @ p["up"].T) ** power @ p["down"].T


def test_layers_in_another_order():
    """Each element of the list is of its own class, whichever is called first."""

    def steps(params, x):
        for i in reversed(range(3)):
            x = powered(params["layers"][i], x, 3 if i == 0 else 2)
        return x

    text = listed(steps, *[MLP] * 3)
    assert re.findall(r"SmallPowered2?(?=,)", text) == ["SmallPowered2", *["SmallPowered"] * 2]
    assert "self.layers = nn.ModuleList(" in text


def test_layers_with_parameters_of_other_lists():
    """A layer is where most of its parameters are, though some are of another list."""

    def steps(params, x):
        for i, p in enumerate(params["layers"]):
            x = powered(p["mlp"], x, 2, params["gains"][i])
            if i % 2:
                x = powered(p["more"], x, 3, params["gains"][i])
        return x

    layers = [{"mlp": MLP, "more": MLP} if i % 2 else {"mlp": MLP} for i in range(4)]
    gains = fm.axes(layers=4)("layers")
    text = listed(steps, *layers, gains=gains)
    assert "make_layers(" in text
    assert "kinds = (SmallLayer, SmallLayer2) * 2" in text


def test_a_module_below_another_ones_place():
    """What is called with a part of one layer lies beside the other parts, and takes no place."""

    def steps(params, x):
        first, second = params["layers"]
        x = powered(first["a"], powered(second["b"], x, 2), 3)
        return powered(first["b"], powered(second["a"], x, 3), 2)

    layer = {"a": MLP, "b": MLP}
    text = listed(steps, layer, layer)
    for name in ("_0.a", "_0.b", "_1.a", "_1.b"):
        assert f"self.layers.{name} = Small" in text
    assert text.count("self.layers = ") == 1


def test_one_parameter_in_two_places():
    """The embedding's table in a head that is no layer: its second place would stay empty."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        logits = ops.unembed(x, params["embed"])
        return logits * torch.sigmoid(logits)  # read twice: not gathered right after the product

    with pytest.raises(LoweringError, match="embed is read in two places") as error:
        source_for_vllm(small(forward, {}, TABLE))
    assert "second parameter" in error.value.lines["fix"]


def test_heads_that_no_layer_replicates():
    """Keys that are used beside their attention too are no part of its fused projection."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        k = einsum(x, params["k"], "... e, h d e -> ... h d")
        q = einsum(x, params["q"], "... e, h d e -> ... h d")
        o = ops.attention(q, k, k)
        x = x + einsum(o, params["o"], "... h d, e h d -> ... e")
        return ops.unembed(x, params["head"])

    params = {
        "q": P("heads head_dim hidden"),
        "k": P("kv_heads head_dim hidden"),
        "o": P("hidden heads head_dim"),
    }
    assert fm.check(small(forward, params, TABLE), tp=2) == [1, 2]  # of 2 KV heads, never 4


def test_what_ranks_sum_lies_in_one_piece():
    """A slice of a pending sum: the engine's collectives read memory from one end to the other."""

    def forward(params, tokens, positions, segment_ids=None):
        x = ops.embed(tokens, params["embed"])
        part = (torch.relu(x @ params["up"].T) @ params["up"])[..., 4:12]
        return ops.unembed(x + torch.cat((part, part), -1), params["head"])

    source = source_for_vllm(small(forward, {"up": P("mlp hidden")}, TABLE))
    assert "tensor_model_parallel_all_reduce(part.contiguous())" in source
