"""DeepSeek-V3 and R1: DeepSeek-V2 with another choice of experts.

Features: those of `models.deepseek_v2` (latent attention, interleaved RoPE with yarn, dense first
layers, shared experts); experts chosen by sigmoids and a bias that keeps them balanced, from the
groups with the best two, and weighted without the bias, renormalised or not.
Papers: DeepSeek-V3, arXiv:2412.19437; balance without a loss, arXiv:2408.15664.

Checked with: tiny random `transformers` models for each feature above; the configs of DeepSeek-V3
and Moonlight-16B-A3B. Published weights were not run.
Not supported: quantised checkpoints, as DeepSeek publishes V3 (convert them to bfloat16), the
layers that predict further tokens (their tensors are passed over), rope on halves of a head,
attention dropout, activations but SiLU. The bias is moved by the training, not by a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.models import deepseek_v2, hf_config
from funcmodels.models.deepseek_v2 import attention, in_best_groups
from funcmodels.models.hf_config import RopeScaling
from funcmodels.models.qwen3 import mlp
from funcmodels.ops import einsum


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "deepseek_v3"
    ONLY = {
        "hidden_act": ("silu",),
        "attention_dropout": (0.0,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
        "rope_interleave": (True,),
        "pretraining_tp": (1,),
    }
    # Sizes that follow from others, further layers, and what the training did.
    READS = (
        "head_dim",
        "qk_head_dim",
        "num_local_experts",
        "num_nextn_predict_layers",
        "num_mtp_layers",
        "aux_loss_alpha",
        "seq_aux",
        "ep_size",
        "output_router_logits",
    )

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    q_lora_rank: int | None = 1536
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        deepseek_v2.check_latent_heads(self)
        deepseek_v2.check_groups(self, least=2)

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """transformers 5 writes `n_routed_experts` as `num_local_experts` too."""
        return {"n_routed_experts": hf.get("num_local_experts"), **hf}


def router_bias(P: Any) -> Any:
    """The bias by which experts are chosen; in float32, whatever the checkpoint's dtype."""
    name = "model.layers.{layers}.mlp.gate.e_score_correction_bias"
    return P("experts", init="zeros", dtype=torch.float32, hf=name)


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a DeepSeek-V2, and the bias of each router."""
    P = fm.axes(experts=cfg.n_routed_experts)
    tree = deepseek_v2.params(cfg)
    for layer in tree["layers"]:
        if "router" in layer["mlp"]:
            layer["mlp"]["bias"] = router_bias(P)
    return tree


@fm.block
def mixture(p: Any, x: Tensor, cfg: Any):
    """Each token by its k experts, and by those that all share: (*batch, seq, hidden) -> same."""
    logits = einsum(x.float(), p["router"].float(), "... e, x e -> ... x")
    scores = logits.sigmoid()  # (*batch, seq, experts), float32
    biased = scores + p["bias"]  # to choose by, not to weigh by
    grouped = biased.unflatten(-1, (cfg.n_group, -1))  # (*batch, seq, groups, experts of one)
    best_two, _ = grouped.topk(2, dim=-1)
    kept = in_best_groups(grouped, best_two.sum(-1), cfg.topk_group)
    _, ids = biased.masked_fill(~kept, -torch.inf).topk(cfg.num_experts_per_tok, dim=-1)
    weights = scores.gather(-1, ids)  # (*batch, seq, k)
    if cfg.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * cfg.routed_scaling_factor
    y = ops.experts(x, weights, ids, p["gate"], p["up"], p["down"], activation="silu")
    return y + mlp(p["shared"], x)


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
    """The DeepSeek-V3 of a config."""
    return fm.Model(
        "FmDeepseekV3ForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding=deepseek_v2.sharding(cfg),
        hf_config=cfg.to_hf(),
        hf_architectures=("DeepseekV3ForCausalLM",),
        # Tensors of the layers that predict further tokens, which stand after the last.
        hf_ignored=(f"model.layers.{cfg.num_hidden_layers}.*",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
