"""BERT as an encoder of sentences: MiniLM, BGE, E5, GTE and their like.

Features: attention to both sides (arXiv:1810.04805), learned positions, LayerNorm
(arXiv:1607.06450) after each sum, GELU, biases everywhere; one vector a sequence by `pooling`, of
length 1 with `normalize` (arXiv:1908.10084).

Checked with: all-MiniLM-L6-v2; tiny random `transformers` models; the configs of MiniLM-L6 and
bge-base. config.json does not say how a sequence becomes one vector: `fm.load_model` reads that
from modules.json, as sentence-transformers writes it; without it say so, as in
`fm.load_model(folder, pooling="mean")`, also of a `BertForMaskedLM`.
Not supported: a second segment (all tokens are of type 0), BERT's own pooler and heads, which are
passed over, dropout, cross-attention, loading quantised checkpoints (the engine does),
activations but GELU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import hf_config
from funcmodels.ops import einsum


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes in Hugging Face's spelling; `pooling` and `normalize` are ours."""

    MODEL_TYPE = "bert"
    ONLY = {
        "hidden_act": ("gelu",),
        "pooling": ("mean", "cls", "last"),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "position_embedding_type": ("absolute",),
    }
    # Of training, and of heads that are not read.
    READS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
             "gradient_checkpointing", "tie_word_embeddings", "directionality", "pooler_fc_size",
             "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
             "pooler_type")  # fmt: skip

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pooling: Literal["mean", "cls", "last"]
    normalize: bool = False


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a BERT, with their axes and the names of Hugging Face's checkpoints."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        positions=cfg.max_position_embeddings,
        types=cfg.type_vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        head_dim=cfg.hidden_size // cfg.num_attention_heads,
        mlp=cfg.intermediate_size,
    )
    at = "encoder.layer.{layers}"
    self_, out = f"{at}.attention.self", f"{at}.attention.output"
    zeros = functools.partial(P, init="zeros")

    def norm(name: str) -> dict[str, Any]:
        return {
            "weight": P("hidden", init="ones", hf=f"{name}.weight"),
            "bias": zeros("hidden", hf=f"{name}.bias"),
        }

    def layer() -> dict[str, Any]:
        heads = "(heads head_dim)"
        return {
            "attn": {
                "q": P("heads head_dim hidden", hf=f"{self_}.query.weight: {heads} hidden"),
                "k": P("heads head_dim hidden", hf=f"{self_}.key.weight: {heads} hidden"),
                "v": P("heads head_dim hidden", hf=f"{self_}.value.weight: {heads} hidden"),
                "o": P("hidden heads head_dim", hf=f"{out}.dense.weight: hidden {heads}"),
                "q_bias": zeros("heads head_dim", hf=f"{self_}.query.bias: {heads}"),
                "k_bias": zeros("heads head_dim", hf=f"{self_}.key.bias: {heads}"),
                "v_bias": zeros("heads head_dim", hf=f"{self_}.value.bias: {heads}"),
                "o_bias": zeros("hidden", hf=f"{out}.dense.bias"),
            },
            "attn_norm": norm(f"{out}.LayerNorm"),
            "mlp": {
                "up": P("mlp hidden", hf=f"{at}.intermediate.dense.weight"),
                "up_bias": zeros("mlp", hf=f"{at}.intermediate.dense.bias"),
                "down": P("hidden mlp", hf=f"{at}.output.dense.weight"),
                "down_bias": zeros("hidden", hf=f"{at}.output.dense.bias"),
            },
            "mlp_norm": norm(f"{at}.output.LayerNorm"),
        }

    return {
        "tokens": P("vocab hidden", hf="embeddings.word_embeddings.weight"),
        "positions": P("positions hidden", hf="embeddings.position_embeddings.weight"),
        "types": P("types hidden", hf="embeddings.token_type_embeddings.weight"),
        "norm": norm("embeddings.LayerNorm"),
        "layers": [layer() for _ in range(cfg.num_hidden_layers)],
    }


def norm(p: Any, x: Tensor, cfg: Config) -> Tensor:
    """LayerNorm with its weight and bias."""
    return ops.layer_norm(x, p["weight"], p["bias"], eps=cfg.layer_norm_eps)


@fm.block
def attention(p: Any, x: Tensor, segment_ids: Tensor | None):
    """Attention to all tokens of the sequence: (*batch, seq, hidden) -> the same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d") + p["q_bias"]  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d") + p["k_bias"]
    v = einsum(x, p["v"], "... e, h d e -> ... h d") + p["v_bias"]
    o = ops.attention(q, k, v, causal=False, segment_ids=segment_ids)
    return einsum(o, p["o"], "... h d, e h d -> ... e") + p["o_bias"]


@fm.block
def mlp(p: Any, x: Tensor):
    """Feed-forward: (*batch, seq, hidden) -> the same."""
    h = einsum(x, p["up"], "... e, f e -> ... f") + p["up_bias"]  # (*batch, seq, mlp)
    return einsum(F.gelu(h), p["down"], "... f, e f -> ... e") + p["down_bias"]


@fm.block
def encoder_layer(p: Any, x: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention and feed-forward, each added to the stream, which is then normalised."""
    x = norm(p["attn_norm"], x + attention(p["attn"], x, segment_ids), cfg)
    return norm(p["mlp_norm"], x + mlp(p["mlp"], x), cfg)


def forward(
    params: Any,
    tokens: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    *,
    cfg: Config,
) -> Tensor:
    """Hidden states (*batch, seq, hidden) of tokens (*batch, seq)."""
    x = ops.embed(tokens, params["tokens"]) + params["types"][0]
    x = norm(params["norm"], x + ops.embed(positions, params["positions"]), cfg)
    for p in params["layers"]:
        x = encoder_layer(p, x, segment_ids, cfg)
    return x


def model(cfg: Config) -> fm.Model:
    """The encoder of a config."""
    return fm.Model(
        "FmBertModel",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("BertModel",),
        hf_ignored=("pooler.dense.*", "embeddings.position_ids", "cls.*"),
        hf_prefix="bert.",  # of checkpoints with a head
        task="embed",
        pooling=cfg.pooling,
        normalize=cfg.normalize,
    )
