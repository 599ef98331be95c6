"""Checkpoint folders: round trip, memory, atomic saving, and every refusal in one error."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import funcmodels as fm
from funcmodels import atomic
from funcmodels.checkpoint_files import INDEX, SINGLE
from funcmodels.errors import CheckpointError, ConfigError
from tests.tiny_llama import HF, state_dict, tiny, weights_of

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


def same(a, b) -> bool:
    """Bit-identical trees."""
    pairs = zip(fm.tree.items(a), fm.tree.items(b), strict=True)
    return all(p == q and x.dtype == y.dtype and torch.equal(x, y) for (p, x), (q, y) in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("shard", [5 * 10**9, 9000], ids=["one file", "sharded"])
def test_round_trip_is_bit_identical(tmp_path, shard, tied, dtype):
    model = tiny(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    weights = weights_of(model, dtype)
    fm.save(model, weights, tmp_path / "out", max_shard_size=shard)
    assert (tmp_path / "out" / INDEX).exists() == (shard == 9000)
    again = fm.load_model(tmp_path / "out")
    assert again.config == model.config
    assert same(fm.load(again, tmp_path / "out"), weights)


def test_transformers_reads_what_save_writes(tmp_path):
    model = tiny(tie_word_embeddings=True)
    weights = weights_of(model, torch.bfloat16)
    fm.save(model, weights, tmp_path / "out", max_shard_size=9000)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["FmLlamaForCausalLM", "LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    module = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert module.dtype == torch.bfloat16
    theirs = module.state_dict()
    for name, tensor in state_dict(model, weights).items():
        assert torch.equal(theirs[name], tensor)


def test_reads_what_transformers_writes(tmp_path):
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**HF))
    module.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).exists()
    model = fm.load_model(tmp_path)
    named = state_dict(model, fm.load(model, tmp_path))
    theirs = module.state_dict()
    assert named.keys() == theirs.keys()
    assert all(torch.equal(named[name], theirs[name]) for name in named)


def test_the_shards_hold_what_the_index_says(tmp_path):
    model = tiny()
    fm.save(model, weights_of(model), tmp_path / "out", max_shard_size=20_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    sizes = {}
    for file in sorted({*index["weight_map"].values()}):
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {*opened.keys()} == {n for n, f in index["weight_map"].items() if f == file}
        sizes[file] = sum(
            t.numel() * t.element_size() for t in load_file(tmp_path / "out" / file).values()
        )
    assert max(sizes.values()) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes.values()) == 4 * model.num_parameters


def test_dtype_is_kept_or_cast(tmp_path):
    model = tiny()
    fm.save(model, weights_of(model, torch.bfloat16), tmp_path / "out")
    assert {v.dtype for v in fm.tree.leaves(fm.load(model, tmp_path / "out"))} == {torch.bfloat16}
    cast = fm.load(model, tmp_path / "out", dtype=torch.float32)
    assert same(cast, fm.tree.map(torch.Tensor.float, weights_of(model, torch.bfloat16)))


def expert_model() -> fm.Model:
    """Weights spread over tensors, and stacked layers: the other layouts of a weight map."""
    P = fm.axes(layers=2, experts=3, hidden=4, mlp=5, vocab=7)
    params = {
        "embed": P("vocab hidden", hf="embed.weight"),
        "up": P("layers experts hidden mlp", hf="h.{layers}.e.{experts}.up: mlp hidden"),
        "scale": P("", init="ones", hf="scale"),
        "norm": P("layers hidden", init="ones", dtype=torch.float32),
    }
    return fm.Model(
        "Experts",
        config={"num_attention_heads": 2, "max_position_embeddings": 32},
        params=params,
        forward=lambda params, tokens, positions, segment_ids=None: tokens,
    )


def test_spread_parameters_round_trip(tmp_path):
    model = expert_model()
    weights = fm.init(model, seed=0, dtype=torch.bfloat16)
    assert weights["norm"].dtype == torch.float32
    fm.save(model, weights, tmp_path / "out", max_shard_size=60)
    assert same(fm.load(model, tmp_path / "out"), weights)
    tensors = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(file)
    assert torch.equal(tensors["h.1.e.2.up"], weights["up"][1, 2].T)
    assert len(tensors) == 9


def test_config_is_built_from_axes_where_no_checkpoint_is_published(tmp_path):
    model = expert_model()
    fm.save(model, fm.init(model, seed=0), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "model_type": "funcmodels",
        "vocab_size": 7,
        "hidden_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
        "architectures": ["Experts"],
        "dtype": "float32",
    }


@dataclass
class Odd:
    num_attention_heads: int
    activation: object


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 2}, r"would lack max_position_embeddings\n(.*\n)+ +fix: +add max"),
        (Odd(2, torch.relu), r'config field "activation" of Experts cannot be written'),
        (object(), r"need: +a dataclass or a mapping"),
    ],
    ids=["not derivable", "not JSON", "no fields"],
)
def test_a_config_that_cannot_be_built_is_refused_before_writing(tmp_path, config, message):
    model = expert_model()
    model = fm.Model("Experts", config=config, params=model.params, forward=model.forward)
    with pytest.raises(ConfigError, match=message):
        fm.save(model, fm.init(model, seed=0), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_zoo_lacks_the_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["MysteryModel"]}')
    with pytest.raises(ConfigError, match=r"architectures=\['MysteryModel'\]"):
        fm.load_model(tmp_path)
    with pytest.raises(ConfigError, match=r"no config\.json in"):
        fm.load_model(tmp_path / "nowhere")


# What a checkpoint can have wrong


def edited(tmp_path: Path, edit, **changes) -> tuple[fm.Model, Path]:
    """A saved tiny Llama whose tensors have been edited."""
    model = tiny(**changes)
    folder = tmp_path / "out"
    fm.save(model, weights_of(model), folder)
    tensors = load_file(folder / SINGLE)
    tensors = edit(tensors) or tensors
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / SINGLE)
    return model, folder


def message_of(model: fm.Model, folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        fm.load(model, folder)
    return str(raised.value).replace(str(folder.parent) + "/", "")


def test_missing_tensors(tmp_path):
    model, folder = edited(tmp_path, lambda t: {k: v for k, v in t.items() if "layernorm" not in k})
    where = model.by_path["layers.0.input_norm"].where
    assert message_of(model, folder) == textwrap.dedent(f"""\
        CheckpointError: 4 of 21 parameters have no tensor in out/ (1 file)
          missing: layers.0.input_norm <- "model.layers.0.input_layernorm.weight"
                   layers.0.post_norm <- "model.layers.0.post_attention_layernorm.weight"
                   layers.1.input_norm <- "model.layers.1.input_layernorm.weight"
                   layers.1.post_norm <- "model.layers.1.post_attention_layernorm.weight"
          unused:  none
          from:    {where}
          fix:     every other name matches FmLlamaForCausalLM; is this a checkpoint of it?""")


def test_many_missing_tensors_are_counted_and_described(tmp_path):
    model, folder = edited(
        tmp_path,
        lambda t: {k: v for k, v in t.items() if "norm" not in k},
        num_hidden_layers=5,
    )
    text = message_of(model, folder)
    assert "... and 6 more, all input_norm or norm or post_norm\n" in text
    assert text.count("<-") == 5


def test_extra_tensors(tmp_path):
    def add(tensors):
        for i in range(7):
            tensors[f"model.layers.{i}.self_attn.q_norm.weight"] = torch.ones(8)

    text = message_of(*edited(tmp_path, add))
    assert text.startswith("CheckpointError: 7 of 28 tensors belong to no parameter, in out/")
    assert "... and 2 more, all q_norm\n" in text
    assert "hf_ignored=('model.layers.*.self_attn.q_norm.weight',)" in text


def test_ignored_tensors(tmp_path):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model, folder = edited(tmp_path, add, tie_word_embeddings=True)
    assert same(fm.load(model, folder), weights_of(model))


def test_misshaped_tensor(tmp_path):
    _, folder = edited(tmp_path, lambda t: None)
    text = message_of(tiny(vocab_size=99), folder)
    assert text.startswith("CheckpointError: 2 of 21 tensors have another shape, in out/ (1 file)")
    assert '"lm_head.weight" is (97, 32), need (99, 32) = vocab hidden' in text
    assert text.endswith("fix:    a config in which vocab is 97 instead of 99")


def test_transposed_tensor(tmp_path):
    def transpose(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors[
            "model.layers.0.mlp.up_proj.weight"
        ].T

    text = message_of(*edited(tmp_path, transpose))
    assert "it is stored transposed: hf='...: hidden mlp'" in text


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int64, "I64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_wrongly_typed_tensor(tmp_path, dtype, name):
    def cast(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)

    text = message_of(*edited(tmp_path, cast))
    assert f'"model.norm.weight" is {name}' in text
    assert "need:  one of F64, F32, F16, BF16" in text
    assert text.endswith("fix:   load the checkpoint that this one was quantised from")


def test_names_without_their_prefix(tmp_path):
    model, folder = edited(tmp_path, lambda t: {k.removeprefix("model."): v for k, v in t.items()})
    assert message_of(model, folder).endswith(
        'the names lack "model.": drop it from the hf= of the parameters'
    )


def test_another_model_entirely(tmp_path):
    model, folder = edited(tmp_path, lambda t: {"x": torch.ones(1)})
    text = message_of(model, folder)
    assert "21 of 21 parameters" in text
    assert "no name matches; is this a checkpoint of FmLlamaForCausalLM?" in text


def test_everything_wrong_is_one_error(tmp_path):
    def edit(tensors):
        del tensors["model.norm.weight"]
        tensors["extra"] = torch.ones(1)
        tensors["lm_head.weight"] = torch.ones(3, 32)
        tensors["model.embed_tokens.weight"] = torch.ones(97, 32, dtype=torch.int32)

    text = message_of(*edited(tmp_path, edit))
    for line in ("missing: norm", 'unused:  "extra"', 'shapes:  "lm_head', 'types:   "model.embed'):
        assert line in text, text


class Bomb:
    def __reduce__(self):
        return (os.abort, ())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_read(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    text = message_of(tiny(), tmp_path)
    assert "holds pickled weights only" in text
    assert "unpickling can run code" in text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no weights"),
        ({"a.safetensors": b"", "b.safetensors": b""}, "holds 2 safetensors files and no index"),
        ({SINGLE: b"version https://git-lfs.github.com/spec/v1\n"}, "fix: +git lfs pull"),
        ({SINGLE: b"\x08\0\0\0\0\0\0\0{}"}, "cannot be read"),
        ({INDEX: b'{"weight_map": {"a": "gone.safetensors"}}'}, "1 of 1 files of .* are missing"),
        ({INDEX: b'{"weight_map": {"a": "../x.safetensors"}}'}, "1 of 1 files of .* are missing"),
        ({INDEX: b"{}"}, "holds no weight_map"),
        ({INDEX: b'{"weight_map": {"a": "b.safetensors"}}', SINGLE: b""}, "holds both"),
    ],
    ids=["empty", "two files", "lfs", "truncated", "lost shard", "path", "bad index", "both"],
)
def test_folders_that_cannot_be_read(tmp_path, files, message):
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(b"")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        fm.load(tiny(), folder)


# What saving refuses, keeps and copies


def test_saving_other_weights_is_refused(tmp_path):
    model = tiny()
    weights = weights_of(model)
    weights["norm"] = torch.ones(3)
    weights["more"] = weights.pop("head")
    with pytest.raises(CheckpointError) as raised:
        fm.save(model, weights, tmp_path / "out")
    text = str(raised.value)
    assert "missing: head\n" in text
    assert "extra:   more\n" in text
    assert "norm is (3,) float32, need (32,)" in text
    assert not (tmp_path / "out").exists()


def test_foreign_files_are_kept_and_companions_copied(tmp_path):
    model = tiny()
    out, base = tmp_path / "out", tmp_path / "base"
    fm.save(model, weights_of(model), out, max_shard_size=9000)
    (out / "notes.md").write_text("mine")
    (out / "runs").mkdir()
    (out / "runs" / "log").write_text("log")
    (out / "tokenizer.json").write_text("old")
    base.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"):
        (base / name).write_text("base")
    fm.save(model, weights_of(model, seed=1), out, like=base)
    assert {p.name: p.read_text() for p in out.iterdir() if p.suffix in (".md", ".jinja")} == {
        "notes.md": "mine",
        "chat_template.jinja": "base",
    }
    assert (out / "runs" / "log").read_text() == "log"
    assert (out / "tokenizer.json").read_text() == "base"
    assert not list(out.glob("*-of-*"))
    assert same(fm.load(model, out), weights_of(model, seed=1))
    assert {p.name for p in tmp_path.iterdir()} == {"out", "base"}


def test_saving_over_the_working_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    with pytest.raises(CheckpointError, match="the working directory is inside"):
        fm.save(model, weights_of(model), ".")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file"):
        fm.save(model, weights_of(model), "file")


def test_saving_through_a_link_replaces_its_target(tmp_path):
    model = tiny()
    fm.save(model, weights_of(model), tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    fm.save(model, weights_of(model, seed=1), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same(fm.load(model, tmp_path / "real"), weights_of(model, seed=1))


def test_one_tensor_given_twice_is_stored_twice(tmp_path):
    model = tiny()
    weights = weights_of(model)
    weights["head"] = weights["embed"]
    fm.save(model, weights, tmp_path / "out")
    assert same(fm.load(model, tmp_path / "out"), weights)


# Killed half-way


def die_at(step: int) -> None:
    """Kill this process at its n-th call of anything that touches the disk."""
    left = [step]

    def counted(fn):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return fn(*args, **kwargs)

        return call

    for owner, name in [(atomic, "sync"), (atomic, "exchange"), (atomic.shutil, "rmtree"),
                        (os, "rename"), (os, "link"), (os, "unlink"), (Path, "rename"),
                        (Path, "mkdir"), (fm.checkpoint, "save_file")]:  # fmt: skip
        setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("has_exchange", [True, False], ids=["exchange", "two renames"])
def test_killed_at_every_step_the_old_or_the_new_folder_is_whole(tmp_path, has_exchange):
    model = tiny(num_hidden_layers=1)
    old, new = weights_of(model), weights_of(model, seed=1)
    out = tmp_path / "out"
    seen = []
    for step in range(100):
        fm.save(model, old, out, max_shard_size=9000)
        (out / "tokenizer.json").write_text("mine")
        if (pid := os.fork()) == 0:
            if not has_exchange:
                atomic.exchange = lambda a, b: False
            die_at(step)
            fm.save(model, new, out)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break
        if step % 2:  # either may come first after a kill, and has to recover the folder
            assert fm.load_model(out).config == model.config
        loaded = fm.load(model, out)
        seen.append("old" if same(loaded, old) else "new")
        assert seen[-1] == "old" or same(loaded, new)
        assert (out / "tokenizer.json").read_text() == "mine"
    else:
        pytest.fail("saving never finished")
    assert seen == sorted(seen, key=["old", "new"].index)  # once new, always new
    assert {*seen} == {"old", "new"}
    assert len(seen) > 10
    fm.save(model, new, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # what the killed ones left is gone


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    model = tiny()
    old, new = weights_of(model), weights_of(model, seed=1)
    out = tmp_path / "out"
    generator = torch.Generator().manual_seed(0)
    fm.save(model, old, out)
    for _ in range(25):
        if (pid := os.fork()) == 0:
            while True:
                fm.save(model, new, out, max_shard_size=9000)
                fm.save(model, old, out)
        os.waitpid(pid, os.WNOHANG)
        signal.sigtimedwait([], float(torch.rand((), generator=generator)) * 0.05)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        loaded = fm.load(fm.load_model(out), out)
        assert same(loaded, old) or same(loaded, new)


# Memory

LARGE = """
import sys
import funcmodels as fm

P = fm.axes(experts=4, a=1024, b=512, c=4)
params = {
    "list": [P("a c b", init="zeros", hf=f"t{i}: (c b) a") for i in range(12)],  # 8 MiB each
    "spread": P("experts a b", init="zeros", hf="e{experts}: b a"),  # 8 MiB over 4 tensors
}
model = fm.Model("M", None, params, hf_config={"model_type": "m"},
                 forward=lambda params, tokens, positions, segment_ids=None: tokens)
"""

MEASURE = """
def mib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))

before = mib("VmRSS")
weights = fm.load(model, sys.argv[1])
held = sum(v.numel() * v.element_size() for v in fm.tree.leaves(weights)) / 2**20
print(held, mib("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_needs_the_weights_and_one_tensor(tmp_path):
    namespace: dict = {}
    exec(LARGE, namespace)
    model = namespace["model"]
    fm.save(model, fm.init(model, seed=0), tmp_path / "m", max_shard_size=40 << 20)
    done = subprocess.run(
        [sys.executable, "-c", LARGE + MEASURE, str(tmp_path / "m")],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    held, peak = map(float, done.stdout.split())
    assert held == 12 * 8 + 8
    assert held - 4 < peak < held + 8 + 4  # a tensor is 8 MiB; 4 for pages of code first used


def test_a_head_that_is_not_the_embedding_is_refused(tmp_path):
    model = tiny(tie_word_embeddings=True)
    fm.save(model, fm.init(model, seed=0), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    fm.load(model, tmp_path / "out")
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r'"lm_head\.weight" is not the tensor') as error:
        fm.load(model, tmp_path / "out")
    assert '"tie_word_embeddings": false' in str(error.value.lines["fix"])


def test_a_quantised_folder_is_a_model_and_has_no_weights_to_load(tmp_path):
    """The function is the same, and served as it is; what fm.save writes is not quantised."""
    plain = tiny()
    fm.save(plain, fm.init(plain, seed=0), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    model = fm.load_model(tmp_path)
    assert "quantization_config" not in model.hf_config
    assert model.tensor_maps.keys() == plain.tensor_maps.keys()
    with pytest.raises(fm.errors.CheckpointError, match=r"method 'mxfp4'\n.*the engine serves"):
        fm.load(model, tmp_path)
