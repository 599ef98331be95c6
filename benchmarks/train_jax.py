"""The training benchmark's side in JAX: the same Llama in Flax NNX, its step jitted, with optax.

Written as Flax's documentation has it: `nnx.jit` of a function of the model and the optimiser.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.flax import load_file

from benchmarks.train_task import LR, Task, packed


def rope(x: Any, positions: Any, theta: float) -> Any:
    """(rows, seq, heads, d), rotated in halves; the angles in float32."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


class Layer(nnx.Module):
    """A decoder layer of a Llama."""

    def __init__(self, hf: dict[str, Any], dtype: Any, rngs: nnx.Rngs) -> None:
        self.theta = hf["rope_theta"]
        width, size = hf["hidden_size"], hf["head_dim"]
        heads, kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
        same = {"use_bias": False, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        norm = {"epsilon": hf["rms_norm_eps"], "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.input_norm = nnx.RMSNorm(width, **norm)
        self.q = nnx.LinearGeneral(width, (heads, size), **same)
        self.k = nnx.LinearGeneral(width, (kv_heads, size), **same)
        self.v = nnx.LinearGeneral(width, (kv_heads, size), **same)
        self.o = nnx.LinearGeneral((heads, size), width, axis=(-2, -1), **same)
        self.post_norm = nnx.RMSNorm(width, **norm)
        self.gate = nnx.Linear(width, hf["intermediate_size"], **same)
        self.up = nnx.Linear(width, hf["intermediate_size"], **same)
        self.down = nnx.Linear(hf["intermediate_size"], width, **same)

    def __call__(self, x: Any, positions: Any, mask: Any) -> Any:
        h = self.input_norm(x)
        q, k = (rope(f(h), positions, self.theta) for f in (self.q, self.k))
        x = x + self.o(jax.nn.dot_product_attention(q, k, self.v(h), mask=mask))
        h = self.post_norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Llama(nnx.Module):
    """Logits (rows, seq, vocab) of tokens."""

    def __init__(self, hf: dict[str, Any], dtype: Any, rngs: nnx.Rngs) -> None:
        width = hf["hidden_size"]
        same = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(hf["vocab_size"], width, **same)
        self.layers = nnx.List([Layer(hf, dtype, rngs) for _ in range(hf["num_hidden_layers"])])
        self.norm = nnx.RMSNorm(width, epsilon=hf["rms_norm_eps"], **same)

    def __call__(self, tokens: Any, positions: Any, mask: Any) -> Any:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, positions, mask)
        return self.embed.attend(self.norm(x))


def loaded(task: Task, dtype: Any) -> Llama:
    """The model with the weights of a checkpoint."""
    model = Llama(task.hf, dtype, nnx.Rngs(0))
    found: dict[str, Any] = {}
    for path in sorted(Path(task.folder).glob("*.safetensors")):
        found |= load_file(path)

    def put(param: Any, name: str) -> None:
        value = found.pop(name).astype(dtype)
        value = value.T if value.ndim == 2 and "embed" not in name else value
        param[...] = value.reshape(param.shape)

    put(model.embed.embedding, "model.embed_tokens.weight")
    put(model.norm.scale, "model.norm.weight")
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}"
        put(layer.input_norm.scale, f"{at}.input_layernorm.weight")
        put(layer.post_norm.scale, f"{at}.post_attention_layernorm.weight")
        for name in "qkvo":
            put(getattr(layer, name).kernel, f"{at}.self_attn.{name}_proj.weight")
        for name in ("gate", "up", "down"):
            put(getattr(layer, name).kernel, f"{at}.mlp.{name}_proj.weight")
    assert not found, list(found)
    return model


def step_of(task: Task) -> Any:
    """A function that takes a step, and gives the loss before it."""
    model = loaded(task, getattr(jnp, task.dtype))
    optimizer = nnx.Optimizer(model, optax.adamw(LR, weight_decay=0.01), wrt=nnx.Param)
    batch = {name: jnp.asarray(np.array(rows)) for name, rows in packed(task).items()}
    ids, seq = batch["ids"], batch["ids"].shape[1]
    causal = np.tril(np.ones((seq, seq), dtype=bool))
    seen = (causal & (ids[:, :, None] == ids[:, None, :]))[:, None]
    labels = jnp.roll(batch["tokens"], -1, axis=1)

    @nnx.jit
    def train_step(model: Any, optimizer: Any) -> Any:
        def loss_fn(model: Any) -> Any:
            logits = model(batch["tokens"], batch["positions"], seen).astype(jnp.float32)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return (each * batch["mask"]).sum() / batch["mask"].sum()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    return lambda: float(train_step(model, optimizer))
