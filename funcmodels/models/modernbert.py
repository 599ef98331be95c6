"""ModernBERT: an encoder with rotary embeddings, and windows in two layers of three.

Features: attention to both sides, in two layers of three to half a window on each side; RoPE
(arXiv:2104.09864) of one base within windows and of another without; pre-norm LayerNorm
(arXiv:1607.06450), none before the first attention; GeGLU (arXiv:2002.05202); optional biases; one
vector a sequence by `pooling`, of length 1 with `normalize`.
Paper: ModernBERT, arXiv:2412.13663.

Checked with: tiny random `transformers` models; the configs of ModernBERT-base and large. Published
weights were not run. How a sequence becomes one vector: see models/bert.py; of the published
`ModernBertForMaskedLM`, `fm.load_model(folder, pooling="mean")` is the encoder.
Not supported: the masked language model's head, which is passed over, dropout, scaled rotary
embeddings, loading quantised checkpoints (the engine does).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import hf_config
from funcmodels.models.hf_config import unless_given
from funcmodels.ops import einsum


def _layer_types(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Every third layer sees everything, or what `global_attn_every_n_layers` says."""
    every = hf.get("global_attn_every_n_layers", 3)
    return tuple(
        "sliding_attention" if i % every else "full_attention"
        for i in range(hf["num_hidden_layers"])
    )


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes in Hugging Face's spelling; `pooling` and `normalize` are ours."""

    MODEL_TYPE = "modernbert"
    ONLY = {
        "hidden_activation": ("gelu",),
        "pooling": ("mean", "cls", "last"),
        "position_embedding_type": ("absolute",),  # as the published configs have it; it is rotary
    }
    # Of training, of heads that are not read, and of kernels.
    READS = ("global_attn_every_n_layers", "initializer_cutoff_factor", "attention_dropout",
             "embedding_dropout", "mlp_dropout", "decoder_bias", "classifier_pooling",
             "classifier_dropout", "classifier_bias", "classifier_activation", "cls_token_id",
             "deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index",
             "gradient_checkpointing", "layer_norm_eps", "reference_compile",
             "repad_logits_with_grad", "tie_word_embeddings")  # fmt: skip

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 8192
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    local_attention: int = 128
    layer_types: tuple[str, ...] = unless_given(_layer_types)
    pooling: Literal["mean", "cls", "last"]
    normalize: bool = False

    @property
    def sliding_window(self) -> int:
        """`local_attention` counts both sides and the token: so many on each, and the token."""
        return self.local_attention // 2 + 1

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the bases of transformers 4: 5 has one dict for each type of layer."""
        if not (ropes := hf.get("rope_parameters")):
            return hf
        found = {key: value for key, value in hf.items() if key != "rope_parameters"}
        names = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
        for layer_type, name in names.items():
            rope = ropes.get(layer_type) or {}
            kind = {"rope_type": rope.get("rope_type")}
            hf_config.check_values(
                kind, model="models.modernbert", only={"rope_type": ("default",)}
            )
            if "rope_theta" in rope:
                found[name] = rope["rope_theta"]
        return found


def params(cfg: Config) -> dict[str, Any]:
    """The parameters, with their axes and the names of Hugging Face's checkpoints."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        head_dim=cfg.hidden_size // cfg.num_attention_heads,
        mlp=cfg.intermediate_size,
    )
    at = "layers.{layers}"
    heads, mlp = cfg.num_attention_heads, cfg.intermediate_size
    zeros = functools.partial(P, init="zeros")

    def norm(name: str) -> dict[str, Any]:
        weight = {"weight": P("hidden", init="ones", hf=f"{name}.weight")}
        return weight | ({"bias": zeros("hidden", hf=f"{name}.bias")} if cfg.norm_bias else {})

    def attention_params() -> dict[str, Any]:
        weights: dict[str, Any] = {}
        for i, name in enumerate("qkv"):  # their rows follow each other in one tensor
            rows, qkv = f"(heads[{i * heads}:{(i + 1) * heads}/{3 * heads}] head_dim)", "attn.Wqkv"
            weights[name] = P("heads head_dim hidden", hf=f"{at}.{qkv}.weight: {rows} hidden")
            if cfg.attention_bias:
                weights[f"{name}_bias"] = zeros("heads head_dim", hf=f"{at}.{qkv}.bias: {rows}")
        out = f"{at}.attn.Wo"
        weights["o"] = P("hidden heads head_dim", hf=f"{out}.weight: hidden (heads head_dim)")
        return weights | (
            {"o_bias": zeros("hidden", hf=f"{out}.bias")} if cfg.attention_bias else {}
        )

    def mlp_params() -> dict[str, Any]:
        weights: dict[str, Any] = {"down": P("hidden mlp", hf=f"{at}.mlp.Wo.weight")}
        if cfg.mlp_bias:
            weights["down_bias"] = zeros("hidden", hf=f"{at}.mlp.Wo.bias")
        for i, name in enumerate(("gate", "up")):
            rows = f"mlp[{i * mlp}:{(i + 1) * mlp}/{2 * mlp}]"
            weights[name] = P("mlp hidden", hf=f"{at}.mlp.Wi.weight: {rows} hidden")
            if cfg.mlp_bias:
                weights[f"{name}_bias"] = zeros("mlp", hf=f"{at}.mlp.Wi.bias: {rows}")
        return weights

    def layer(i: int) -> dict[str, Any]:
        first = {} if i == 0 else {"attn_norm": norm(f"{at}.attn_norm")}
        rest = {"mlp_norm": norm(f"{at}.mlp_norm"), "mlp": mlp_params()}
        return first | {"attn": attention_params()} | rest

    return {
        "embed": P("vocab hidden", hf="embeddings.tok_embeddings.weight"),
        "embed_norm": norm("embeddings.norm"),
        "layers": [layer(i) for i in range(cfg.num_hidden_layers)],
        "norm": norm("final_norm"),
    }


def norm(p: Any, x: Tensor, cfg: Config) -> Tensor:
    """LayerNorm, with a bias where there is one."""
    return ops.layer_norm(x, p["weight"], p.get("bias"), eps=cfg.norm_eps)


@fm.block
def attention(
    p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, layer_type: str, cfg: Config
):
    """Attention to both sides with rotary embeddings: (*batch, seq, hidden) -> the same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")
    v = einsum(x, p["v"], "... e, h d e -> ... h d")
    if "q_bias" in p:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    is_local = layer_type == "sliding_attention"
    theta = cfg.local_rope_theta if is_local else cfg.global_rope_theta
    q, k = ops.rope(q, k, positions, theta=theta, max_position=cfg.max_position_embeddings)
    window = cfg.sliding_window if is_local else None
    o = ops.attention(q, k, v, causal=False, window=window, segment_ids=segment_ids)
    out = einsum(o, p["o"], "... h d, e h d -> ... e")
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def mlp(p: Any, x: Tensor):
    """GeGLU feed-forward: (*batch, seq, hidden) -> the same."""
    gate = einsum(x, p["gate"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    up = einsum(x, p["up"], "... e, f e -> ... f")
    if "gate_bias" in p:
        gate, up = gate + p["gate_bias"], up + p["up_bias"]
    down = einsum(ops.geglu(gate, up, approximate="none"), p["down"], "... f, e f -> ... e")
    return down + p["down_bias"] if "down_bias" in p else down


@fm.block
def encoder_layer(
    p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, layer_type: str, cfg: Config
):
    """Attention and feed-forward, each on the normalised stream and added to it."""
    h = norm(p["attn_norm"], x, cfg) if "attn_norm" in p else x
    x = x + attention(p["attn"], h, positions, segment_ids, layer_type, cfg)
    return x + mlp(p["mlp"], norm(p["mlp_norm"], x, cfg))


def forward(
    params: Any,
    tokens: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    *,
    cfg: Config,
) -> Tensor:
    """Hidden states (*batch, seq, hidden) of tokens (*batch, seq)."""
    x = norm(params["embed_norm"], ops.embed(tokens, params["embed"]), cfg)
    for p, layer_type in zip(params["layers"], cfg.layer_types, strict=True):
        x = encoder_layer(p, x, positions, segment_ids, layer_type, cfg)
    return norm(params["norm"], x, cfg)


def model(cfg: Config) -> fm.Model:
    """The encoder of a config."""
    return fm.Model(
        "FmModernBertModel",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", "heads": "tp", "mlp": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("ModernBertModel",),
        hf_ignored=("head.*", "decoder.*"),
        hf_prefix="model.",  # of checkpoints with a head, as the published ones
        task="embed",
        pooling=cfg.pooling,
        normalize=cfg.normalize,
    )
