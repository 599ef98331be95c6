"""A linear attention that exists nowhere: written, trained until it recalls, served on two ranks.

    python -m examples.novel_recurrence [--steps 400]

What is new of a token replaces what the memory holds under its key, as the delta rule has it, but
squashed: no surprise is larger than one. So the step is not linear in the state, there is no
chunked form, and no kernel of anyone's. The task: pairs of a key and a value, then one of the keys
again, and the model is to say its value.

The model is the 49 lines before `questions`; the rest is the task, training and the engine.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from einops import einsum

import funcmodels as fm
from examples.engine import ask, engine
from funcmodels import ops

KEYS, PAIRS, HEADS, SIZE = 16, 6, 2, 16  # tokens 0 to 15 are keys, 16 to 31 values
P = fm.axes(vocab=2 * KEYS, hidden=64, heads=HEADS, key=SIZE, value=SIZE, width=2)


def surprised(state, x):  # one token: pytrees in, pytrees out
    held = einsum(x["k"], state["S"], "... h k, ... h k v -> ... h v")
    change = x["beta"][..., None] * torch.tanh(x["v"] - held)
    S = state["S"] + einsum(x["k"], change, "... h k, ... h v -> ... h k v")
    return {"S": S}, einsum(x["q"], S, "... h k, ... h k v -> ... h v")


@fm.block
def remember(p, x, segment_ids):
    h = ops.short_conv(ops.rms_norm(x, p["norm"], eps=1e-6), p["conv"], segment_ids=segment_ids)
    q, k, v = (einsum(h, p[name], "... e, h d e -> ... h d") for name in "qkv")
    beta = einsum(h, p["beta"], "... e, h e -> ... h").sigmoid()
    xs = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v, "beta": beta}
    memory = fm.state(
        S="heads key value", dtype=x.dtype, heads=HEADS, key=SIZE, value=SIZE
    )  # zeros before a document
    y = ops.recurrent(surprised, memory, xs, segment_ids=segment_ids)
    return x + einsum(y, p["o"], "... h v, e h v -> ... e")


def forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["embed"])
    for p in params["layers"]:
        x = remember(p, x, segment_ids)
    return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-6), params["head"])


def layer():
    return {
        "norm": P("hidden", init="ones"),
        "conv": P("hidden width"),  # a token sees the one before: a value its key
        "q": P("heads key hidden"),
        "k": P("heads key hidden"),
        "v": P("heads value hidden"),
        "beta": P("heads hidden"),
        "o": P("hidden heads value"),
    }


model = fm.Model(
    "SurprisedForCausalLM",
    config={
        "max_position_embeddings": 512,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": SIZE,
    },
    params={
        "embed": P("vocab hidden"),
        "layers": [layer(), layer()],
        "norm": P("hidden", init="ones"),
        "head": P("vocab hidden"),
    },
    forward=forward,
    sharding={"vocab": "tp", "heads": "tp"},
)


def questions(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 2 PAIRS + 1) tokens, and the value that each row asks for."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.stack([torch.randperm(KEYS, generator=generator)[:PAIRS] for _ in range(rows)])
    values = KEYS + torch.randint(KEYS, (rows, PAIRS), generator=generator)
    asked = torch.randint(PAIRS, (rows, 1), generator=generator)
    pairs = torch.stack([keys, values], -1).flatten(1)
    return torch.cat([pairs, keys.gather(1, asked)], 1), values.gather(1, asked)[:, 0]


def answers(weights, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of what follows each row."""
    return model.forward(weights, tokens, torch.arange(tokens.shape[1]).expand(tokens.shape))[:, -1]


def loss_fn(weights, batch) -> torch.Tensor:
    tokens, wanted = batch
    return F.cross_entropy(answers(weights, tokens), wanted)


def main(steps: int = 400) -> None:
    weights = fm.init(model, seed=0)
    optimizer = fm.optim.adamw(fm.optim.cosine(3e-3, total=steps, warmup=20))
    state = optimizer.init(weights)
    for step in range(steps):
        grads, loss = torch.func.grad_and_value(loss_fn)(weights, questions(64, seed=step))
        weights, state = optimizer.update(grads, state, weights)
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss:.4f}")
    tokens, wanted = questions(256, seed=10**6)
    right = answers(weights, tokens).argmax(-1)
    print(f"recalled {(right == wanted).sum()} of 256 that it has not seen")

    with tempfile.TemporaryDirectory() as folder:
        fm.save(model, weights, folder)
        fm.register(model)
        settings = {"dtype": "float32", "skip_tokenizer_init": True, "tensor_parallel_size": 2}
        log = Path(folder) / "engine.log"
        with engine(folder, log=log, enable_prefix_caching=False, **settings) as llm:
            served = [a.tokens[0] for a in ask(llm, tokens[:64].tolist(), max_tokens=1)]
    same = sum(a == b for a, b in zip(served, right[:64].tolist(), strict=True))
    print(f"served on two ranks: {same} of 64 answers the same")


if __name__ == "__main__":
    typer.run(main)
