"""The peer in JAX: the same Llama in Flax, its step jitted; one JSON line of seconds last.

    python -m benchmarks.gpu_jax '{"hf": ..., "rows": 3, "documents": [...]}' TURNS

Attention is `jax.nn.dot_product_attention` on cuDNN with a mask of the documents; JAX has no public
attention for packed sequences.
"""

import json
import sys
import time
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

BF16 = jnp.bfloat16
LR = 1e-4


def rope(x: Any, positions: Any, theta: float) -> Any:
    """(rows, seq, heads, d), rotated in halves."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle).astype(BF16), jnp.sin(angle).astype(BF16)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


class Layer(nn.Module):
    """A decoder layer of a Llama."""

    hf: Any

    @nn.compact
    def __call__(self, x: Any, positions: Any, mask: Any) -> Any:
        c = dict(self.hf)
        project = partial(nn.DenseGeneral, use_bias=False, dtype=BF16, param_dtype=BF16)
        norm = partial(nn.RMSNorm, epsilon=c["rms_norm_eps"], dtype=BF16, param_dtype=BF16)
        h = norm()(x)
        q = project((c["num_attention_heads"], c["head_dim"]))(h)
        k = project((c["num_key_value_heads"], c["head_dim"]))(h)
        v = project((c["num_key_value_heads"], c["head_dim"]))(h)
        q, k = (rope(t, positions, c["rope_theta"]) for t in (q, k))
        on = "cudnn" if jax.default_backend() == "gpu" else "xla"
        o = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=on)
        x = x + project(c["hidden_size"], axis=(-2, -1))(o)
        h = norm()(x)
        gate, up = (project(c["intermediate_size"])(h) for _ in range(2))
        return x + project(c["hidden_size"])(nn.silu(gate) * up)


class Llama(nn.Module):
    """Logits (rows, seq, vocab) of tokens."""

    hf: Any

    @nn.compact
    def __call__(self, tokens: Any, positions: Any, mask: Any) -> Any:
        c = dict(self.hf)
        table = nn.Embed(c["vocab_size"], c["hidden_size"], dtype=BF16, param_dtype=BF16)
        x = table(tokens)
        for _ in range(c["num_hidden_layers"]):
            x = Layer(self.hf)(x, positions, mask)
        norm = nn.RMSNorm(epsilon=c["rms_norm_eps"], dtype=BF16, param_dtype=BF16)
        return table.attend(norm(x))


def measure(told: dict[str, Any], count: int) -> list[float]:
    """Seconds of each turn."""
    hf = tuple((k, v) for k, v in told["hf"].items() if not isinstance(v, dict))
    rows, documents = told["rows"], told["documents"]
    ids = np.repeat(np.arange(len(documents)), documents)
    positions = np.concatenate([np.arange(n) for n in documents])
    mask = jnp.asarray(
        np.broadcast_to((ids[:, None] == ids)[None, None], (rows, 1, *(len(ids),) * 2))
    )
    positions = jnp.asarray(np.broadcast_to(positions, (rows, len(ids))))
    tokens = jax.random.randint(jax.random.key(0), (rows, len(ids)), 0, told["hf"]["vocab_size"])
    labels = jnp.roll(tokens, -1, axis=1)
    counts = (jnp.roll(positions, -1, axis=1) != 0).astype(jnp.float32)
    model = Llama(hf)
    weights = jax.jit(model.init)(
        jax.random.key(1), tokens[:1, :8], positions[:1, :8], mask[:1, :, :8, :8]
    )

    def loss_of(weights: Any) -> Any:
        logits = model.apply(weights, tokens, positions, mask).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - picked
        return (nats * counts).sum() / counts.sum()

    @partial(jax.jit, donate_argnums=0)
    def step(weights: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(weights)
        return jax.tree.map(lambda w, g: (w - LR * g).astype(w.dtype), weights, grads), loss

    for _ in range(2):
        weights, loss = step(weights)
    jax.block_until_ready(loss)
    assert np.isfinite(loss), loss
    times = []
    for _ in range(count):
        start = time.perf_counter()
        for _ in range(3):
            weights, loss = step(weights)
        jax.block_until_ready((weights, loss))
        times.append((time.perf_counter() - start) / 3)
    return times


def main() -> None:
    times = measure(json.loads(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps({"version": jax.__version__, "seconds": times}))


if __name__ == "__main__":
    main()
