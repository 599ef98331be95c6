"""`fm.nn.to_vllm`: a user's module on vLLM's layers, in vLLM's own parallel state and engine."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import funcmodels as fm
from tests.engine.harness import run_in_engine, serve
from tests.nn import modules
from tests.nn.modules import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, Decoder

TOKENS = torch.arange(0, 90, 7)
POSITIONS = torch.arange(len(TOKENS))
TOLERANCE = 2e-5  # float32, other kernels and another order of sums


def in_parallel_state(ranks: int, fn: Callable[[], Any]) -> list[Any]:
    """What `fn()` returns on each of forked ranks, where vLLM would make its models."""

    def fork() -> list[Any]:
        context = multiprocessing.get_context("fork")
        with tempfile.TemporaryDirectory() as folder:

            def child(rank: int) -> None:
                torch.save(_with_state(rank, ranks, folder, fn), f"{folder}/{rank}.pt")

            processes = [context.Process(target=child, args=(rank,)) for rank in range(ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
                assert process.exitcode == 0
            return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]

    return run_in_engine(fork, env={"VLLM_DIST_IDENT": f"test_nn_{os.getpid()}"})


def _with_state(rank: int, ranks: int, folder: str, fn: Callable[[], Any]) -> Any:
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    # Its own kernels: the rope's writes to what it is given, and reads it right only if it is flat.
    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"]))
    config.parallel_config.tensor_parallel_size = ranks
    with set_current_vllm_config(config), torch.no_grad():
        parallel_state.init_distributed_environment(
            ranks, rank, f"file://{folder}/rendezvous", rank, "gloo"
        )
        parallel_state.initialize_model_parallel(ranks)
        return fn()


def ready(module: nn.Module) -> nn.Module:
    """As vLLM leaves a model when its weights are loaded."""
    for layer in module.modules():
        if (method := getattr(layer, "quant_method", None)) is not None:
            method.process_weights_after_loading(layer)
    return module


def source(mesh: Any = None) -> Decoder:
    torch.manual_seed(0)
    module = Decoder(mesh)
    modules.scaled(module, 1.0)
    return module


def outputs(module: Any, head: Any) -> dict[str, torch.Tensor]:
    x = module.embed(TOKENS)
    heads = module.attn.q(x).unflatten(-1, (-1, HEAD_DIM))
    return {
        "embed": x,
        "norm": module.mlp.norm(x),
        "layer_norm": module.mlp.last(x),
        "heads": module.attn.q_norm(heads),
        "rope": module.attn.rope(heads, heads[:, :1], POSITIONS)[0],
        "mlp": module.mlp(x),
        "logits": head(module.mlp(x)),
    }


ROPES: dict[str, dict[str, Any]] = {
    "halves": {},
    "neighbours": {"interleaved": True},
    "some": {"rotary_dim": 16},
    "linear": {"scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {
        "scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "llama3": {
        "scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


BY_LENGTH: dict[str, dict[str, Any]] = {
    "dynamic": {"scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "longrope": {
        "scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0 + i / 16 for i in range(16)],
            "long_factor": [4.0] * 16,
            "original_max_position_embeddings": 32,
        }
    },
}


def ropes(of: dict[str, dict[str, Any]] = ROPES) -> dict[str, fm.nn.RotaryEmbedding]:
    given = {"theta": 100.0, "max_position": 64}
    return {n: fm.nn.RotaryEmbedding(HEAD_DIM, **given, **o) for n, o in of.items()}


def turned(rope: Any) -> torch.Tensor:
    q = torch.randn(len(TOKENS), 2, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    return torch.cat(rope(q, q[:, :1], POSITIONS), 1)


class Derived(fm.nn.RMSNorm):
    pass


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(3))


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def of_rank() -> dict[str, Any]:
    from vllm.config import get_current_vllm_config
    from vllm.distributed.parallel_state import get_tp_group
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    made: Any = fm.nn.to_vllm(source(), prefix="model")
    # A module that lies in parts already, on vLLM's own ranks.
    parts: Any = fm.nn.to_vllm(source(get_tp_group().device_group))
    processor = LogitsProcessor(VOCAB)
    found: dict[str, Any] = {
        "kinds": {name: type(layer).__module__ for name, layer in made.named_modules()},
        "tied": made.head.weight is made.embed.weight,
        "prefix": made.mlp.down.prefix,
        "parts": {
            name: torch.equal(value, made.get_parameter(name))
            for name, value in parts.named_parameters()
            if "embed" not in name  # vLLM's padding is memory as it comes
        },
    }
    found |= outputs(ready(made), lambda x: processor(made.head, x))
    q = torch.ones(3, 2, HEAD_DIM)
    made.attn.rope(q, q, torch.arange(3))
    found["q is kept"] = bool((q == 1).all())
    found["ropes"] = {name: turned(fm.nn.to_vllm(rope)) for name, rope in ropes().items()}
    with torch.device("meta"):
        buffered = WithBuffer()
    norm = fm.nn.RMSNorm(4, eps=1e-6, offset=0.5)
    no_end = fm.nn.RotaryEmbedding(HEAD_DIM, theta=100.0)
    found["errors"] = {
        "offset": refused(lambda: fm.nn.to_vllm(norm, prefix="model.norm")),
        "derived": refused(lambda: fm.nn.to_vllm(Derived(4, eps=1e-6))),
        "positions": refused(lambda: fm.nn.to_vllm(no_end)),
        "buffer": refused(lambda: fm.nn.to_vllm(buffered, prefix="model")),
        "values": refused(lambda: fm.nn.to_vllm(source().mlp, quant_config=object())),
    }
    by_length = ropes(BY_LENGTH)
    found["errors"]["length"] = refused(lambda: fm.nn.to_vllm(by_length["dynamic"]))
    config = get_current_vllm_config()
    config.model_config = SimpleNamespace(max_model_len=32)  # all that a rope asks of it
    found["ropes"] |= {name: turned(fm.nn.to_vllm(rope)) for name, rope in by_length.items()}
    config.model_config = SimpleNamespace(max_model_len=100)
    for name in ("yarn", "dynamic", "longrope"):
        long = (ropes() | by_length)[name]
        found["errors"][name] = refused(lambda rope=long: fm.nn.to_vllm(rope))
    table = fm.nn.to_vllm(ropes()["halves"]).rope.cos_sin_cache
    return found | {"table": len(table)}


REFUSED = {
    "length": r"is not known\n +got: +rope type 'dynamic', outside an engine",
    "yarn": r"angles for 64 positions[\s\S]*max_model_len=64",
    "dynamic": r"'dynamic' depends on the length[\s\S]*max_model_len=64",
    "longrope": r"angles for 64 positions",
    "offset": r"no RMSNorm with offset 0.5[\s\S]*from: +model.norm\n +fix: +fold the offset",
    "derived": r"no layer for Derived[\s\S]*need: +ColumnParallelLinear, [\s\S]*wrap a layer",
    "positions": r"is not known\n +got: +no max_position[\s\S]*give max_position",
    "buffer": r"model.mask\n +got: +a buffer on the meta device",
    "values": r"got: +norm.weight on cpu[\s\S]*torch.device\(\"meta\"\)",
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_module_on_vllms_layers_is_the_module(ranks):
    with torch.no_grad():
        module = source()
        want = outputs(module, module.head)
        angles = {name: turned(rope) for name, rope in ropes({**ROPES, **BY_LENGTH}).items()}
    for rank, got in enumerate(in_parallel_state(ranks, of_rank)):
        for name, value in want.items():
            if name in ("heads", "rope"):
                value = value.chunk(ranks, 1)[rank]
            torch.testing.assert_close(got[name], value, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(got["ropes"], angles, rtol=TOLERANCE, atol=TOLERANCE)
        assert got["table"] == 100
        assert got["tied"]
        assert got["q is kept"]
        assert got["prefix"] == "model.mlp.down"
        assert all(got["parts"].values())
        for name, kind in got["kinds"].items():
            if isinstance(dict(module.named_modules()).get(name), fm.nn.ParallelLayer):
                assert kind.startswith("vllm.") or name == "attn.rope", (name, kind)
        assert got["kinds"]["attn.rope.rope"].startswith("vllm.")
        for what, pattern in REFUSED.items():
            assert re.search(pattern, got["errors"][what]), got["errors"][what]


def served_class() -> type:
    """A class for vLLM written by hand around the user's modules."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    class Served(nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            with torch.device("meta"):
                module = Decoder()
            self.model: Any = fm.nn.to_vllm(module, prefix="model")
            ranks = vllm_config.parallel_config.tensor_parallel_size
            self.attention = Attention(
                HEADS // ranks,
                HEAD_DIM,
                HEAD_DIM**-0.5,
                num_kv_heads=KV_HEADS // ranks,
                cache_config=vllm_config.cache_config,
                prefix="model.layers.0.attn",
            )
            self.logits_processor = LogitsProcessor(VOCAB)

        def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model.embed(input_ids)

        def forward(self, input_ids: Any, positions: Any, *_: Any, **__: Any) -> torch.Tensor:
            x, attn = self.model.embed(input_ids), self.model.attn
            q, k, v = (y.unflatten(-1, (-1, HEAD_DIM)) for y in (attn.q(x), attn.k(x), attn.v(x)))
            q, k = attn.rope(attn.q_norm(q), attn.k_norm(k), positions)
            y = self.attention(q.flatten(-2), k.flatten(-2), v.flatten(-2))
            y = y.unflatten(-1, (-1, HEAD_DIM)) * attn.factor
            return self.model.mlp(x + attn.o(y.flatten(-2)))

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.logits_processor(self.model.head, hidden_states)

        def load_weights(self, weights: Any) -> set[str]:
            params = dict(self.named_parameters())
            for name, weight in weights:
                loader = getattr(params[name], "weight_loader", default_weight_loader)
                loader(params[name], weight)
            return set(params)

    return Served


def test_inside_a_class_written_by_hand(tmp_path):
    """From the meta device, filled by the class's own load_weights, on two ranks."""
    module = source()
    state = {f"model.{name}": x for name, x in fm.nn.whole(module).items() if "head" not in name}
    save_file(state, tmp_path / "model.safetensors")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": modules.INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 64,
        "rms_norm_eps": modules.EPS,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompts = [TOKENS.tolist(), [5, 9], [88, *range(3, 40)]]

    def register() -> None:
        from vllm import ModelRegistry

        ModelRegistry.register_model("TestNNByHand", served_class())

    served = serve(
        tmp_path,
        prompts,
        arch="TestNNByHand",
        register=register,
        tp=2,
        prompt_logprobs=True,
        max_model_len=64,
    )
    exact = (
        module.double()
    )  # logits of a dozen: float32's own error would be half of what is allowed
    for prompt, answer in zip(prompts, served, strict=True):
        row = prompt + answer.tokens
        with torch.no_grad():
            logprobs = exact(torch.tensor([row]))[0].log_softmax(-1)
        assert answer.tokens == logprobs[len(prompt) - 1 : -1].argmax(-1).tolist()
        want = logprobs[range(len(row) - 1), row[1:]]
        got = torch.tensor(answer.all_logprobs, dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=0, atol=3e-5)
