"""A training step of a Llama of 1.2 billion parameters, packed, against `transformers` and JAX.

Llama-3.2-1B's configuration with random weights, bfloat16, sequences of 4096 tokens with several
documents each. A step is the loss, its gradients, and `w -= lr * g`. Ours is
`torch.func.grad_and_value` of the pure function under `torch.compile`; `transformers` is its model
under `torch.compile` with `loss.backward()`, once for each of its attention implementations. Both
sides hold the very same weights in memory, and must find the same loss.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import funcmodels as fm
from benchmarks.gpu_time import BACKEND, BF16, DEVICE, progress, turns, wait
from benchmarks.table import Row, compare, spread
from funcmodels.models import llama

LR = 1e-4
IGNORED = -100
OURS = "ours"
HF: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Size:
    """What is trained on: `rows` sequences of `seq` tokens."""

    hf: dict[str, Any]
    rows: int
    seq: int

    @property
    def documents(self) -> list[int]:
        """Tokens of the documents of one row."""
        return [self.seq // 2, self.seq // 4, self.seq // 8, self.seq // 16, self.seq // 16]

    @property
    def flop(self) -> float:
        """Of one step: products with weights, and the visible half of attention."""
        c, tokens = self.hf, self.rows * self.seq
        q = c["num_attention_heads"] * c["head_dim"]
        kv = c["num_key_value_heads"] * c["head_dim"]
        layer = 2 * c["hidden_size"] * (q + kv) + 3 * c["hidden_size"] * c["intermediate_size"]
        weights = c["num_hidden_layers"] * layer + c["vocab_size"] * c["hidden_size"]
        seen = self.rows * sum(n * n for n in self.documents) / 2
        return 6 * weights * tokens + 3 * 4 * q * seen * c["num_hidden_layers"]


# More rows do not fit into 80 GB where `transformers` is not compiled.
BIG, SMALL = Size(HF, 3, 4096), Size({**HF, **TINY}, 2, 64)


@dataclass(frozen=True)
class Batch:
    """Packed rows, (rows, seq) each."""

    tokens: Tensor
    labels: Tensor  # the next token of the same document, or IGNORED
    positions: Tensor
    segment_ids: Tensor
    starts: Tensor  # (documents + 1,), in the flat order
    longest: int


def batch_of(size: Size) -> Batch:
    torch.manual_seed(0)
    shape = (size.rows, size.seq)
    tokens = torch.randint(0, size.hf["vocab_size"], shape, device=DEVICE)
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(size.documents)]).to(DEVICE)
    positions = torch.cat([torch.arange(n) for n in size.documents]).to(DEVICE)
    labels = tokens.roll(-1, dims=1)
    labels[:, positions.roll(-1) == 0] = IGNORED
    ends = torch.tensor(size.documents * size.rows).cumsum(0)
    return Batch(
        tokens,
        labels,
        positions.expand(shape).contiguous(),
        ids.expand(shape).contiguous(),
        torch.cat((torch.zeros(1, dtype=torch.long), ends)).int().to(DEVICE),
        max(size.documents),
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """In float32, as `transformers` takes it."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)


def ours(model: fm.Model, weights: Any, batch: Batch) -> Callable[[], Tensor]:
    def loss_of(weights: Any, tokens: Tensor, labels: Tensor, positions: Tensor, ids: Tensor):
        return cross_entropy(model.forward(weights, tokens, positions, ids), labels)

    gradients = torch.compile(torch.func.grad_and_value(loss_of), backend=BACKEND)
    flat = fm.tree.leaves(weights)

    def step() -> Tensor:
        grads, loss = gradients(
            weights, batch.tokens, batch.labels, batch.positions, batch.segment_ids
        )
        torch._foreach_add_(flat, fm.tree.leaves(grads), alpha=-LR)
        return loss

    return step


def theirs(module: Any, batch: Batch, attention: str) -> Callable[[], Tensor]:
    """`transformers` under torch.compile, told of the documents as this attention wants it."""
    attention, _, mode = attention.partition(", ")
    # Flash attention breaks its graph in every layer, and every break is compiled for every layer.
    compiled = module if mode == "eager" else torch.compile(module, backend=BACKEND)
    tokens, positions, labels = batch.tokens, batch.positions, batch.labels
    more: dict[str, Any] = {}
    if attention.startswith("flash"):  # one row of all tokens, and where its documents begin
        tokens, positions, labels = (t.reshape(1, -1) for t in (tokens, positions, labels))
        more = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch.starts)
        more |= dict.fromkeys(("max_length_q", "max_length_k"), batch.longest)
    else:
        more["attention_mask"] = _mask(module, batch, attention)
    params = list(module.parameters())
    module.set_attn_implementation(attention)

    def step() -> Tensor:
        module.config._attn_implementation = attention  # all sides share the one module
        out = compiled(input_ids=tokens, position_ids=positions, use_cache=False, **more)
        loss = cross_entropy(out.logits, labels)
        loss.backward()
        with torch.no_grad():
            torch._foreach_add_(params, [p.grad for p in params], alpha=-LR)
        for p in params:
            p.grad = None
        return loss.detach()

    return step


def _mask(module: Any, batch: Batch, attention: str) -> Any:
    """What SDPA and FlexAttention are masked with: made once, which is to their advantage."""
    ids = batch.segment_ids
    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        rows, seq = ids.shape
        return create_block_mask(
            lambda b, h, i, j: (i >= j) & (ids[b, i] == ids[b, j]),
            rows, None, seq, seq, device=DEVICE.type,
        )  # fmt: skip
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=DEVICE).tril()
    return (causal & (ids[:, :, None] == ids[:, None, :]))[:, None]


def training(*, quick: bool) -> Callable[[float, int], list[Row]]:
    """Compile all sides; what is returned measures them, given the chip's FLOP/s and the turns."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    size = SMALL if quick else BIG
    batch = batch_of(size)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        # Not .to(BF16): it would round the frequencies of the rotary embedding as well.
        module = AutoModelForCausalLM.from_config(LlamaConfig(**size.hf), dtype=BF16)
    model = llama.model(llama.Config.from_hf(size.hf))
    steps = {OURS: ours(model, _shared(model, module), batch)}
    peers = ["sdpa"]
    if DEVICE.type == "cuda":
        peers += ["flex_attention"] + ["flash_attention_4, eager"] * bool(find_spec("flash_attn"))
    losses = {OURS: steps[OURS]().item()}
    progress(f"ours compiled, loss {losses[OURS]:.4f}")
    for peer in peers:
        name = f"transformers {peer}"
        try:
            step = theirs(module, batch, peer)
            losses[name] = step().item()
        except Exception as error:  # a peer that does not run is named, not hidden
            progress(f"{name} does not run: {type(error).__name__}: {str(error)[:300]}")
        else:
            steps[name] = step
            progress(f"{name} compiled, loss {losses[name]:.4f}")

    def measure(rate: float, count: int) -> list[Row]:
        memory = {name: _peak(step) for name, step in steps.items()}
        return _rows(size, rate, turns(steps, count, at_least=0.5), losses, memory)

    return measure


def _rows(size: Size, rate: float, times: dict, losses: dict, memory: dict) -> list[Row]:
    """Of each peer, so that every one is in the table: the ratio is of the same turns."""
    tokens = size.rows * size.seq
    speeds = {name: [tokens / t for t in values] for name, values in times.items()}
    mine = speeds.pop(OURS)
    what = f"training step, {size.rows} x {size.seq} packed ± {spread(mine):.1%}"
    rows = []
    for name, values in speeds.items():
        rows.append(compare(what, mine, {name: values}, "tokens/s"))
        for of, found, unit in (("peak memory", memory, "GB"), ("first loss", losses, "nats")):
            ratio = found[name] / found[OURS]
            rows.append(Row(f"{of} of a step", found[OURS], found[name], name, ratio, unit))
    used = size.flop / median(times[OURS])
    rows.append(
        Row(
            "model FLOP per second", used / 1e12, rate / 1e12, "matrix rate", used / rate, "TFLOP/s"
        )
    )
    return rows


def _shared(model: fm.Model, module: Any) -> Any:
    """Our tree of weights as views of the module's parameters."""
    state = {name: p.detach() for name, p in module.named_parameters()}
    maps = model.tensor_maps

    def view(path: str, _param: Any) -> Tensor:
        tensors = [state[name] for name in maps[path].names]
        weight = maps[path].to_param(tensors)
        assert weight.data_ptr() == tensors[0].data_ptr(), "a copy, not a view"
        return weight

    return fm.tree.map_with_path(view, model.params)


def _peak(step: Callable[[], Any]) -> float:
    """GB allocated at most during a step that has been compiled."""
    if DEVICE.type == "cpu":
        return 1.0
    gc.collect()
    torch.cuda.empty_cache()
    wait()
    torch.cuda.reset_peak_memory_stats()
    step()
    wait()
    return torch.cuda.max_memory_allocated() / 1e9


def jax_training(mine: float, *, quick: bool, count: int) -> list[Row]:
    """Flax in a process of its own, after the others: JAX keeps what memory it has once taken."""
    size = SMALL if quick else BIG
    told = json.dumps({"hf": size.hf, "rows": size.rows, "documents": size.documents})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_jax", told, str(count)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    if done.returncode:
        Console(stderr=True).print(done.stderr[-2000:])
        return []
    found = json.loads(done.stdout.splitlines()[-1])
    theirs = size.rows * size.seq / median(found["seconds"])
    name = f"Flax, JAX {found['version']}"
    return [Row("training step, not in turns", mine, theirs, name, mine / theirs, "tokens/s")]
