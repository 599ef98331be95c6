"""Models reach the processes that vLLM starts: real ones, as users start them, without a fork."""

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

import funcmodels as fm
from tests.engine.custom import custom
from tests.engine.tiny import PROMPTS, expected, saved, tiny_llama

ROOT = Path(__file__).parents[2]
PLUGINS = importlib.metadata.entry_points(group="vllm.general_plugins")

pytestmark = pytest.mark.slow
needs_plugin = pytest.mark.skipif(
    "funcmodels" not in PLUGINS.names, reason="needs the package installed: pip install -e ."
)

SERVE = """
def serve(folder, **settings):
    import json
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_num_seqs=4,
        max_model_len=128, kv_cache_memory_bytes=32 << 20, disable_log_stats=True, **settings,
    )
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": p} for p in %s]
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    print("TOKENS", json.dumps([list(a.outputs[0].token_ids) for a in answers]), flush=True)
"""


def environment(**changes):
    """Of a machine with few cores; the caller's cache folder."""
    return {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        **{name: str(value) for name, value in changes.items()},
    }


def run_script(folder, text, **env):
    """The output of a script in a process of its own, in a folder of its own."""
    script = folder / "script.py"
    script.write_text(SERVE % PROMPTS + textwrap.dedent(text))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def tokens_in(output):
    [line] = [x for x in output.splitlines() if x.startswith("TOKENS")]
    return json.loads(line.removeprefix("TOKENS"))


def tokens_of(model, weights):
    return [tokens for tokens, _ in expected(model, weights)]


@needs_plugin
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_register_in_a_script(where, tmp_path):
    """The model is defined in the script itself, which no worker may need to import."""
    model = custom(local_window=24)
    weights = saved(model, tmp_path / "out")
    source = Path(sys.modules[custom.__module__].__file__).read_text()
    (tmp_path / "functions.py").write_text(source)
    register = "fm.register(custom(local_window=24))"
    lines = [
        *(["import funcmodels as fm", "from functions import custom"]),
        *([register] if where == "outside" else []),
        'if __name__ == "__main__":',
        *([f"    {register}"] if where == "inside" else []),
        f'    serve("out", tensor_parallel_size={2 if where == "inside" else 1})',
    ]
    output = run_script(tmp_path, "\n".join(lines))
    assert tokens_in(output) == tokens_of(model, weights)


@needs_plugin
def test_a_factory_is_told_of_the_live_engine(tmp_path):
    model = tiny_llama()
    weights = saved(model, tmp_path / "out")
    source = (Path(__file__).parent / "factories.py").read_text()
    (tmp_path / "my_factory.py").write_text(source)
    output = run_script(
        tmp_path,
        """
        import funcmodels as fm
        from my_factory import recording

        if __name__ == "__main__":
            fm.register(recording, name="Recorded")
            serve(
                "out", tensor_parallel_size=2, hf_overrides={"architectures": ["Recorded"]}
            )
        """,
        RECORD=tmp_path,
    )
    assert tokens_in(output) == tokens_of(model, weights)
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    common = {"version": 1, "tp_size": 2, "pp_size": 1, "tp_group": 2, "pp_group": 1}
    assert seen == [{**common, "tp_rank": 0}, {**common, "tp_rank": 1}]


def test_a_factory_of_the_main_script_is_refused(tmp_path):
    """Workers cannot import it; said at once, with what to do."""
    output = run_script(
        tmp_path,
        """
        import funcmodels as fm

        def factory(hf_config, parallel):
            raise NotImplementedError

        try:
            fm.register(factory, name="Mine")
        except ValueError as error:
            print(error)
        """,
    )
    assert "cannot import the factory 'factory'" in output
    assert "fix:  move it to a file of its own" in output


@pytest.mark.parametrize("tp", [1, 2])
def test_an_emitted_file_stands_alone(tp, tmp_path):
    """Served where neither package can be imported, in this process or in a worker."""
    model = custom(local_window=24, has_sinks=True, has_gains=True)
    weights = saved(model, tmp_path / "out")
    fm.emit(model, tmp_path / "served.py")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # A type that vLLM knows by itself; config.json's own is known where funcmodels is installed.
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    output = run_script(
        tmp_path,
        f"""
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("compiler", "funcmodels"):
                    raise ImportError(f"{{name}} is blocked")

        sys.meta_path.insert(0, Blocker())
        from vllm import ModelRegistry

        ModelRegistry.register_model("{model.name}", "served:{model.name}")
        if __name__ == "__main__":
            serve("out", tensor_parallel_size={tp})
            assert not {{"compiler", "funcmodels"}} & set(sys.modules)
        """,
        VLLM_PLUGINS="",
        PYTHONPATH=tmp_path,
    )
    assert tokens_in(output) == tokens_of(model, weights)


def add_tokenizer(folder, size=256):
    """One word a token, so that texts and ids say the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w255")
    fast.save_pretrained(folder)


def complete(folder, log, prompts, *options, **env):
    """Start vLLM's server on a folder, ask for completions, and stop it; texts and metrics."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; that command itself looks for a package "vllm", and the CPU build's
    # is named "vllm-cpu", so that there it ends before it begins.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--port", str(port), "--host", "127.0.0.1"),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "128"),
        *("--max-num-seqs", "4", "--kv-cache-memory-bytes", str(32 << 20)),
        *options,
    ]
    with log.open("w") as out:
        server = subprocess.Popen(
            command, env=environment(**env), stdout=out, stderr=out, start_new_session=True
        )
    body = {"prompt": prompts, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps({**body, "model": str(folder)}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and server.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    texts = [choice["text"] for choice in json.load(answer)["choices"]]
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as metrics:
                    return texts, metrics.read().decode()
            except OSError:  # not listening yet
                time.sleep(0.5)
        raise AssertionError(log.read_text()[-5000:])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@needs_plugin
def test_vllm_serve_answers_from_a_folder_of_the_zoo(tmp_path):
    """Nothing is registered: the plugin knows the zoo. Two engines share the requests."""
    model = tiny_llama()
    weights = saved(model, tmp_path / "out")
    add_tokenizer(tmp_path / "out")
    prompts = PROMPTS[:2] * 2
    parallel = ("--data-parallel-size", "2")
    texts, metrics = complete(tmp_path / "out", tmp_path / "log", prompts, *parallel)
    wants = tokens_of(model, weights)[:2] * 2
    assert [text.split() for text in texts] == [[f"w{t}" for t in want] for want in wants]
    for engine in "01":
        [made] = re.findall(rf'vllm:generation_tokens_total{{engine="{engine}".*}} (\S+)', metrics)
        assert float(made) > 0
    assert "Resolved architecture: FmLlamaForCausalLM" in (tmp_path / "log").read_text()


@needs_plugin
def test_persisted_for_processes_that_others_start(tmp_path):
    model = custom(local_window=24)
    weights = saved(model, tmp_path / "out")
    add_tokenizer(tmp_path / "out")
    source = Path(sys.modules[custom.__module__].__file__).read_text()
    (tmp_path / "functions.py").write_text(source)
    run_script(
        tmp_path,
        """
        import funcmodels as fm
        from functions import custom

        fm.register(custom(local_window=24), persist=True)
        """,
        FUNCMODELS_CACHE=tmp_path / "cache",
    )
    assert (tmp_path / "cache" / "served" / "registered.json").exists()
    [text], _ = complete(
        tmp_path / "out", tmp_path / "log", PROMPTS[0], FUNCMODELS_CACHE=tmp_path / "cache"
    )
    [want, *_] = tokens_of(model, weights)
    assert text.split() == [f"w{t}" for t in want]
