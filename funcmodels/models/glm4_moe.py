"""GLM-4.5, GLM-4.6 and their Air sizes: grouped-query attention, and DeepSeek-V3's experts.

Features: RMSNorm (arXiv:1910.07467), RoPE (arXiv:2104.09864) on the first half of each head,
grouped-query attention (arXiv:2305.13245) with biases, QK norm (arXiv:2302.05442) in the larger
size, dense first layers; then experts chosen by sigmoids and a bias that keeps them balanced
(arXiv:2408.15664), from all or from the best groups, and one that all tokens share.
Papers: GLM-4.5, arXiv:2508.06471; the experts are those of DeepSeek-V3, arXiv:2412.19437.

Checked with: tiny random `transformers` models for each feature above; the configs of GLM-4.5 and
GLM-4.5-Air. Published weights were not run.
Not supported: quantised checkpoints, the layer that predicts a further token (its tensors are
passed over), attention dropout, activations but SiLU. The bias is moved by the training, by no
gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import deepseek_v2, hf_config
from funcmodels.models.deepseek_v3 import mixture, router_bias
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.models.qwen3 import mlp
from funcmodels.ops import einsum


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "glm4_moe"
    ONLY = {"hidden_act": ("silu",), "attention_dropout": (0, 0.0)}
    # Further layers, a size under another name, and what the training reports.
    READS = (
        "num_local_experts",
        "num_nextn_predict_layers",
        "num_mtp_layers",
        "output_router_logits",
    )

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = unless_given(lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
    n_routed_experts: int
    n_shared_experts: int = 1
    num_experts_per_tok: int
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 1
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 0.5
    attention_bias: bool = False
    use_qk_norm: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        deepseek_v2.check_groups(self, least=2)

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """As transformers 5 means it.

        It writes `n_routed_experts` as `num_local_experts` too, and adds a
        `partial_rotary_factor` of 0.5 that does not count where `rope_parameters` holds another.
        """
        plain = {"n_routed_experts": hf.get("num_local_experts"), **hf}
        if (hf.get("rope_parameters") or {}).get("partial_rotary_factor") is not None:
            plain.pop("partial_rotary_factor", None)
        return plain


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a GLM-4-MoE, with their axes and the names of its checkpoints."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        kv_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        mlp=cfg.intermediate_size,
        experts=cfg.n_routed_experts,
        expert_mlp=cfg.moe_intermediate_size,
        shared_mlp=cfg.moe_intermediate_size * cfg.n_shared_experts,
    )
    at = "model.layers.{layers}"
    attn, ffn = f"{at}.self_attn", f"{at}.mlp"
    kv = "(kv_heads head_dim)"

    def attention_params() -> dict[str, Any]:
        weights = {
            "q": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: (heads head_dim) hidden"),
            "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
            "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
            "o": P("hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden (heads head_dim)"),
        }
        if cfg.attention_bias:  # the output has none
            zeros = functools.partial(P, init="zeros")
            weights |= {
                "q_bias": zeros("heads head_dim", hf=f"{attn}.q_proj.bias: (heads head_dim)"),
                "k_bias": zeros("kv_heads head_dim", hf=f"{attn}.k_proj.bias: {kv}"),
                "v_bias": zeros("kv_heads head_dim", hf=f"{attn}.v_proj.bias: {kv}"),
            }
        if cfg.use_qk_norm:
            weights |= {
                "q_norm": P("head_dim", init="ones", hf=f"{attn}.q_norm.weight"),
                "k_norm": P("head_dim", init="ones", hf=f"{attn}.k_norm.weight"),
            }
        return weights

    def mlp_params(at: str, width: str) -> dict[str, Any]:
        return {
            "gate": P(f"{width} hidden", hf=f"{at}.gate_proj.weight"),
            "up": P(f"{width} hidden", hf=f"{at}.up_proj.weight"),
            "down": P(f"hidden {width}", hf=f"{at}.down_proj.weight"),
        }

    def mixture_params() -> dict[str, Any]:
        one = f"{ffn}.experts.{{experts}}"
        return {
            "router": P("experts hidden", hf=f"{ffn}.gate.weight"),
            "bias": router_bias(P),
            "gate": P("experts expert_mlp hidden", hf=f"{one}.gate_proj.weight"),
            "up": P("experts expert_mlp hidden", hf=f"{one}.up_proj.weight"),
            "down": P("experts hidden expert_mlp", hf=f"{one}.down_proj.weight"),
            "shared": mlp_params(f"{ffn}.shared_experts", "shared_mlp"),
        }

    def layer(index: int) -> dict[str, Any]:
        dense = index < cfg.first_k_dense_replace
        return {
            "input_norm": P("hidden", init="ones", hf=f"{at}.input_layernorm.weight"),
            "attn": attention_params(),
            "post_norm": P("hidden", init="ones", hf=f"{at}.post_attention_layernorm.weight"),
            "mlp": mlp_params(ffn, "mlp") if dense else mixture_params(),
        }

    tree = {
        "embed": P("vocab hidden", hf="model.embed_tokens.weight"),
        "layers": [layer(index) for index in range(cfg.num_hidden_layers)],
        "norm": P("hidden", init="ones", hf="model.norm.weight"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Grouped-query attention of heads that rope turns in part: (*batch, seq, hidden) -> same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    if "q_bias" in p:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    if "q_norm" in p:
        q = ops.rms_norm(q, p["q_norm"], eps=cfg.rms_norm_eps)
        k = ops.rms_norm(k, p["k_norm"], eps=cfg.rms_norm_eps)
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        max_position=cfg.max_position_embeddings,
        rotary_dim=int(cfg.head_dim * cfg.partial_rotary_factor),
    )
    o = ops.attention(q, k, v, segment_ids=segment_ids)
    return einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention and feed-forward, each on the normalised stream and added to it."""
    h = ops.rms_norm(x, p["input_norm"], eps=cfg.rms_norm_eps)
    x = x + attention(p["attn"], h, positions, segment_ids, cfg)
    h = ops.rms_norm(x, p["post_norm"], eps=cfg.rms_norm_eps)
    return x + (mixture(p["mlp"], h, cfg) if "router" in p["mlp"] else mlp(p["mlp"], h))


def forward(
    params: Any,
    tokens: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    *,
    cfg: Config,
) -> Tensor:
    """Logits (*batch, seq, vocab) of tokens (*batch, seq); also (num_tokens,) -> (.., vocab)."""
    x = ops.embed(tokens, params["embed"])  # (*batch, seq, hidden)
    for p in params["layers"]:
        x = decoder_layer(p, x, positions, segment_ids, cfg)
    x = ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The GLM-4-MoE of a config."""
    return fm.Model(
        "FmGlm4MoeForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={**deepseek_v2.sharding(cfg), "kv_heads": "tp"},
        hf_config=cfg.to_hf(),
        hf_architectures=("Glm4MoeForCausalLM",),
        # Tensors of the layer that predicts a further token, which stands after the last.
        hf_ignored=(f"model.layers.{cfg.num_hidden_layers}.*",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
