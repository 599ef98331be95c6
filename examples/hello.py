"""A model, declared, trained, saved and served: the file that the README shows."""

import torch
import torch.nn.functional as F
from einops import einsum

import funcmodels as fm
from funcmodels import ops

P = fm.axes(vocab=256, hidden=64, heads=4, head_dim=32)


def layer():  # declarations: nothing is allocated
    return {
        "norm": P("hidden", init="ones"),
        "q": P("heads head_dim hidden"),
        "k": P("heads head_dim hidden"),
        "v": P("heads head_dim hidden"),
        "o": P("hidden heads head_dim"),
    }


@fm.block  # a pure function; served, it becomes one nn.Module
def attention(p, x, positions, segment_ids):
    h = ops.rms_norm(x, p["norm"], eps=1e-6)
    q = einsum(h, p["q"], "... e, h d e -> ... h d")
    k = einsum(h, p["k"], "... e, h d e -> ... h d")
    v = einsum(h, p["v"], "... e, h d e -> ... h d")
    q, k = ops.rope(q, k, positions, theta=10_000.0)
    o = ops.attention(q, k, v, segment_ids=segment_ids)
    return x + einsum(o, p["o"], "... h d, e h d -> ... e")


def forward(params, tokens, positions, segment_ids=None):
    x = ops.embed(tokens, params["embed"])
    for p in params["layers"]:
        x = attention(p, x, positions, segment_ids)
    return ops.unembed(ops.rms_norm(x, params["norm"], eps=1e-6), params["embed"])


model = fm.Model(
    "HelloForCausalLM",
    config={"max_position_embeddings": 128},
    params={
        "embed": P("vocab hidden"),
        "layers": [layer(), layer()],
        "norm": P("hidden", init="ones"),
    },
    forward=forward,
    sharding={"vocab": "tp", "heads": "tp"},  # the only thing said about parallelism
)


def loss_fn(weights, tokens):
    logits = model.forward(weights, tokens[:-1], torch.arange(len(tokens) - 1))
    return F.cross_entropy(logits, tokens[1:])


if __name__ == "__main__":
    text = torch.tensor(list(b"Written once, trained and served. " * 3))
    weights = fm.init(model, seed=0)
    for _ in range(80):
        grads, loss = torch.func.grad_and_value(loss_fn)(weights, text)
        weights = fm.tree.map(lambda w, g: w - 0.3 * g, weights, grads)
    print(f"loss {loss:.4f}")
    fm.save(model, weights, "out/hello")

    from vllm import LLM, SamplingParams

    fm.register(model)  # reaches every process that vLLM starts
    small = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}  # starts in seconds
    llm = LLM("out/hello", dtype="float32", skip_tokenizer_init=True, **small)
    params = SamplingParams(temperature=0, max_tokens=30, detokenize=False)
    [answer] = llm.generate({"prompt_token_ids": list(b"Writ")}, params)
    print("Writ" + bytes(answer.outputs[0].token_ids).decode())
