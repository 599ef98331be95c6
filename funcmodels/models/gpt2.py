"""GPT-2: learned positions, layer norms before each half, biases everywhere, multi-head attention.

Features: an embedding of positions, LayerNorm (arXiv:1607.06450), a feed-forward layer with GELU by
its tanh approximation, tied embeddings; scores divided by the layer's number where the config says
so. Checkpoints hold queries, keys and values in one matrix, and all matrices as [in, out].
Paper: Radford et al. 2019, Language Models are Unsupervised Multitask Learners; `transformers`
modeling_gpt2.

Checked with: tiny random `transformers` models for each feature above; the sizes of gpt2 to
gpt2-xl.
Not supported: quantised checkpoints, cross-attention, dropout (that of published configs is read,
and none is done).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import ConfigError
from funcmodels.models import hf_config
from funcmodels.models.hf_config import unless_given
from funcmodels.ops import einsum


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling, which is GPT-2's own."""

    MODEL_TYPE = "gpt2"
    ONLY = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "add_cross_attention": (False,),
    }
    # Dropout, which is none here; heads of other models; n_positions again; an order of summation;
    # two fields of GPT-1.
    READS = (
        "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_activation", "summary_first_dropout",
        "summary_proj_to_labels", "summary_type", "summary_use_proj", "n_ctx",
        "reorder_and_upcast_attn", "gradient_checkpointing", "n_special", "predict_special_tokens",
        "output_past",
    )  # fmt: skip

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int = unless_given(lambda hf: 4 * hf["n_embd"])
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise ConfigError(
                "the hidden size is not divided by the heads",
                got=f"n_embd={self.n_embd}, n_head={self.n_head}",
                need="n_head divides n_embd",
                fix=f"n_embd={self.n_embd // self.n_head * self.n_head}",
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def scale(self, layer: int) -> float:
        """Of the scores of a layer."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def params(cfg: Config) -> dict[str, Any]:
    """The parameters, with their axes and the names of Hugging Face's checkpoints."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        positions=cfg.n_positions,
        hidden=cfg.n_embd,
        heads=cfg.n_head,
        head_dim=cfg.head_dim,
        mlp=cfg.n_inner,
    )
    zeros = functools.partial(P, init="zeros")
    at = "transformer.h.{layers}"

    def norm(name: str) -> dict[str, Any]:
        return {
            "weight": P("hidden", init="ones", hf=f"{name}.weight"),
            "bias": zeros("hidden", hf=f"{name}.bias"),
        }

    def attention_params() -> dict[str, Any]:
        weights: dict[str, Any] = {
            "o": P("hidden heads head_dim", hf=f"{at}.attn.c_proj.weight: (heads head_dim) hidden"),
            "o_bias": zeros("hidden", hf=f"{at}.attn.c_proj.bias"),
        }
        n = cfg.n_head
        for i, name in enumerate("qkv"):  # their columns follow each other in one matrix
            rows = f"(heads[{i * n}:{(i + 1) * n}/{3 * n}] head_dim)"
            weights[name] = P("heads head_dim hidden", hf=f"{at}.attn.c_attn.weight: hidden {rows}")
            weights[f"{name}_bias"] = zeros("heads head_dim", hf=f"{at}.attn.c_attn.bias: {rows}")
        return weights

    def layer() -> dict[str, Any]:
        return {
            "ln_1": norm(f"{at}.ln_1"),
            "attn": attention_params(),
            "ln_2": norm(f"{at}.ln_2"),
            "mlp": {
                "up": P("mlp hidden", hf=f"{at}.mlp.c_fc.weight: hidden mlp"),
                "up_bias": zeros("mlp", hf=f"{at}.mlp.c_fc.bias"),
                "down": P("hidden mlp", hf=f"{at}.mlp.c_proj.weight: mlp hidden"),
                "down_bias": zeros("hidden", hf=f"{at}.mlp.c_proj.bias"),
            },
        }

    tree = {
        "embed": P("vocab hidden", hf="transformer.wte.weight"),
        "positions": P("positions hidden", hf="transformer.wpe.weight"),
        "layers": [layer() for _ in range(cfg.n_layer)],
        "norm": norm("transformer.ln_f"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


@fm.block
def attention(p: Any, x: Tensor, segment_ids: Tensor | None, scale: float):
    """Multi-head self-attention: (*batch, seq, hidden) -> the same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d") + p["q_bias"]  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d") + p["k_bias"]  # (*batch, seq, heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d") + p["v_bias"]  # (*batch, seq, heads, head_dim)
    o = ops.attention(q, k, v, scale=scale, segment_ids=segment_ids)
    return einsum(o, p["o"], "... h d, e h d -> ... e") + p["o_bias"]  # (*batch, seq, hidden)


@fm.block
def mlp(p: Any, x: Tensor):
    """Feed-forward with GELU: (*batch, seq, hidden) -> the same."""
    up = einsum(x, p["up"], "... e, f e -> ... f") + p["up_bias"]  # (*batch, seq, mlp)
    h = F.gelu(up, approximate="tanh")
    return einsum(h, p["down"], "... f, e f -> ... e") + p["down_bias"]  # (*batch, seq, hidden)


@fm.block
def decoder_layer(p: Any, x: Tensor, segment_ids: Tensor | None, scale: float, eps: float):
    """Attention and feed-forward, each on the normalised stream and added to it."""
    h = ops.layer_norm(x, p["ln_1"]["weight"], p["ln_1"]["bias"], eps=eps)
    x = x + attention(p["attn"], h, segment_ids, scale)
    h = ops.layer_norm(x, p["ln_2"]["weight"], p["ln_2"]["bias"], eps=eps)
    return x + mlp(p["mlp"], h)


def forward(
    params: Any,
    tokens: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    *,
    cfg: Config,
) -> Tensor:
    """Logits (*batch, seq, vocab) of tokens (*batch, seq); also (num_tokens,) -> (.., vocab)."""
    x = ops.embed(tokens, params["embed"]) + ops.embed(positions, params["positions"])
    for i, p in enumerate(params["layers"]):
        x = decoder_layer(p, x, segment_ids, cfg.scale(i), cfg.layer_norm_epsilon)
    norm = params["norm"]
    x = ops.layer_norm(x, norm["weight"], norm["bias"], eps=cfg.layer_norm_epsilon)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The GPT-2 of a config."""
    return fm.Model(
        "FmGPT2LMHeadModel",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("GPT2LMHeadModel",),
        # Masks, which old checkpoints hold as tensors.
        hf_ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
        hf_prefix="transformer.",  # published checkpoints leave it out
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
