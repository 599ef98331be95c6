"""DeepSeek-V2: latent attention, and a mixture of many small experts beside shared ones.

Features: multi-head latent attention (MLA), with queries from a latent of their own or without;
interleaved RoPE (arXiv:2104.09864) on a part of each head, yarn scaling (arXiv:2309.00071) that
scales the scores too; RMSNorm (arXiv:1910.07467); SwiGLU (arXiv:2002.05202); dense first layers;
experts chosen by softmax, from all of them or from the groups with the best one; shared experts.
Papers: DeepSeek-V2, arXiv:2405.04434; DeepSeekMoE, arXiv:2401.06066.

Checked with: tiny random `transformers` models for each feature above; the configs of V2-Lite and
V2. Published weights were not run.
Not supported: quantised checkpoints, attention dropout, biases of the feed-forward, experts in
some layers only, activations but SiLU. The losses that balance the experts are the training's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import ConfigError
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.models.qwen3 import mlp
from funcmodels.ops import einsum

LATENT_EPS = 1e-6  # of the norms of latents, whatever rms_norm_eps is


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "deepseek_v2"
    ONLY = {
        "hidden_act": ("silu",),
        "attention_dropout": (0.0,),
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
        "moe_layer_freq": (1,),
        "mlp_bias": (False,),
        "pretraining_tp": (1,),
    }
    # Sizes that follow from others, and what the training did.
    READS = (
        "head_dim",
        "qk_head_dim",
        "num_experts",
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
    num_key_value_heads: int = unless_given(lambda hf: hf["num_attention_heads"])
    q_lora_rank: int | None = 1536
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_latent_heads(self)
        if self.topk_method not in ("greedy", "group_limited_greedy"):
            raise ConfigError(
                "models.deepseek_v2 does not choose experts in this way",
                got=f"topk_method={self.topk_method!r}",
                need='"greedy" or "group_limited_greedy"',
                fix="models.deepseek_v3, if it is the router of DeepSeek-V3",
            )
        if self.topk_method == "group_limited_greedy":
            check_groups(self)

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """transformers 5 writes `n_routed_experts` as `num_experts` too."""
        return {"n_routed_experts": hf.get("num_experts"), **hf}


def check_latent_heads(cfg: Any) -> None:
    """Each query head has keys and values of its own.

    Raises:
        ConfigError: another number of key-value heads.
    """
    if cfg.num_key_value_heads != cfg.num_attention_heads:
        raise ConfigError(
            "latent attention has no groups of query heads",
            got=f"num_attention_heads={cfg.num_attention_heads}, "
            f"num_key_value_heads={cfg.num_key_value_heads}",
            need="one number",
            fix=f"num_key_value_heads={cfg.num_attention_heads}",
        )


def check_groups(cfg: Any, least: int = 1) -> None:
    """Experts divide over groups, and enough groups are taken for the experts of a token.

    Args:
        least: how many experts of a group it is judged by.
    Raises:
        ConfigError: they do not, or are not.
    """
    groups, taken = cfg.n_group or 0, cfg.topk_group or 0
    size = cfg.n_routed_experts // max(groups, 1)
    if not groups or cfg.n_routed_experts % groups or not 1 <= taken <= groups or size < least:
        problem = "experts cannot be chosen from these groups"
    elif cfg.num_experts_per_tok > taken * size:
        problem = "the groups that are taken hold fewer experts than a token needs"
    else:
        return
    raise ConfigError(
        problem,
        got=f"n_routed_experts={cfg.n_routed_experts}, n_group={cfg.n_group}, "
        f"topk_group={cfg.topk_group}, num_experts_per_tok={cfg.num_experts_per_tok}",
        need=f"n_group divides n_routed_experts into {least} or more; "
        "topk_group groups hold num_experts_per_tok",
        fix='"n_group": 1, "topk_group": 1 for a choice from all experts',
    )


def params(cfg: Any) -> dict[str, Any]:
    """The parameters of a DeepSeek-V2, with their axes and the names of its checkpoints."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        qk_dim=cfg.qk_nope_head_dim + cfg.qk_rope_head_dim,
        kv_dim=cfg.qk_nope_head_dim + cfg.v_head_dim,
        v_dim=cfg.v_head_dim,
        q_latent=cfg.q_lora_rank or 1,
        latent=cfg.kv_lora_rank,
        latent_rope=cfg.kv_lora_rank + cfg.qk_rope_head_dim,
        mlp=cfg.intermediate_size,
        experts=cfg.n_routed_experts,
        expert_mlp=cfg.moe_intermediate_size,
        shared_mlp=cfg.moe_intermediate_size * cfg.n_shared_experts,
    )
    at = "model.layers.{layers}"
    attn, ffn = f"{at}.self_attn", f"{at}.mlp"
    q = "(heads qk_dim)"

    def query_params() -> dict[str, Any]:
        if cfg.q_lora_rank is None:
            return {"q": P("heads qk_dim hidden", hf=f"{attn}.q_proj.weight: {q} hidden")}
        return {
            "q_a": P("q_latent hidden", hf=f"{attn}.q_a_proj.weight"),
            "q_norm": P("q_latent", init="ones", hf=f"{attn}.q_a_layernorm.weight"),
            "q_b": P("heads qk_dim q_latent", hf=f"{attn}.q_b_proj.weight: {q} q_latent"),
        }

    def attention_params() -> dict[str, Any]:
        kv, o = "(heads kv_dim) latent", "hidden (heads v_dim)"
        weights = {
            **query_params(),
            "kv_a": P("latent_rope hidden", hf=f"{attn}.kv_a_proj_with_mqa.weight"),
            "kv_norm": P("latent", init="ones", hf=f"{attn}.kv_a_layernorm.weight"),
            "kv_b": P("heads kv_dim latent", hf=f"{attn}.kv_b_proj.weight: {kv}"),
            "o": P("hidden heads v_dim", hf=f"{attn}.o_proj.weight: {o}"),
        }
        if not cfg.attention_bias:
            return weights
        zeros = functools.partial(P, init="zeros")
        if cfg.q_lora_rank is not None:
            weights["q_a_bias"] = zeros("q_latent", hf=f"{attn}.q_a_proj.bias")
        return weights | {
            "kv_a_bias": zeros("latent_rope", hf=f"{attn}.kv_a_proj_with_mqa.bias"),
            "o_bias": zeros("hidden", hf=f"{attn}.o_proj.bias"),
        }

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


def score_scale(cfg: Any) -> float:
    """The scale of the scores: yarn sharpens them where the config says by how much."""
    scale = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5
    rope = dict(cfg.rope_scaling or ())
    if not rope.get("mscale_all_dim") or rope["factor"] <= 1:
        return scale
    return scale * (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Any):
    """Latent attention: (*batch, seq, hidden) -> the same."""
    if "q_a" in p:
        q = einsum(x, p["q_a"], "... e, r e -> ... r")  # (*batch, seq, q_latent)
        q = q + p["q_a_bias"] if "q_a_bias" in p else q
        q = ops.rms_norm(q, p["q_norm"], eps=LATENT_EPS)
        q = einsum(q, p["q_b"], "... r, h d r -> ... h d")  # (*batch, seq, heads, qk_dim)
    else:
        q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, qk_dim)
    kv = einsum(x, p["kv_a"], "... e, r e -> ... r")  # (*batch, seq, latent_rope)
    kv = kv + p["kv_a_bias"] if "kv_a_bias" in p else kv
    latent, k_rope = kv.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], dim=-1)
    q_nope, q_rope = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], dim=-1)
    q_rope, k_rope = ops.rope(
        q_rope,
        k_rope.unsqueeze(-2),  # (*batch, seq, 1, rope): one head for all
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        max_position=cfg.max_position_embeddings,
        interleaved=True,
    )
    o = ops.latent_attention(
        q_nope,
        q_rope,
        ops.rms_norm(latent, p["kv_norm"], eps=LATENT_EPS),
        k_rope,
        p["kv_b"],
        scale=score_scale(cfg),
        segment_ids=segment_ids,
    )  # (*batch, seq, heads, v_dim)
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


def in_best_groups(scores: Tensor, best: Tensor, count: int) -> Tensor:
    """Whether an expert's group is among the best: (*batch, seq, experts), boolean.

    Args:
        scores: (*batch, seq, groups, experts of a group).
        best: (*batch, seq, groups), what groups are judged by.
    """
    _, ids = best.topk(count, dim=-1)
    taken = torch.zeros_like(best).scatter(-1, ids, 1.0) > 0  # (*batch, seq, groups)
    return taken.unsqueeze(-1).expand(scores.shape).flatten(-2)


@fm.block
def mixture(p: Any, x: Tensor, cfg: Config):
    """Each token by its k experts, and by those that all share: (*batch, seq, hidden) -> same."""
    logits = einsum(x.float(), p["router"].float(), "... e, x e -> ... x")
    scores = logits.softmax(-1)  # (*batch, seq, experts), float32
    if cfg.topk_method == "group_limited_greedy":
        grouped = scores.unflatten(-1, (cfg.n_group or 1, -1))
        kept = in_best_groups(grouped, grouped.amax(-1), cfg.topk_group or 1)
        scores = scores.masked_fill(~kept, 0.0)
    weights, ids = scores.topk(cfg.num_experts_per_tok, dim=-1)  # (*batch, seq, k)
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


def sharding(cfg: Any) -> dict[str, str | None]:
    """Heads, vocabulary and every feed-forward over "tp"; whole experts over "ep"."""
    table: dict[str, str | None] = {"vocab": "tp", "heads": "tp"}
    dense = min(cfg.first_k_dense_replace, cfg.num_hidden_layers)
    if dense:
        table |= {"mlp": "tp"}
    if dense < cfg.num_hidden_layers:
        table |= {"expert_mlp": "tp", "shared_mlp": "tp", "experts": "ep"}
    return table


def model(cfg: Config) -> fm.Model:
    """The DeepSeek-V2 of a config."""
    return fm.Model(
        "FmDeepseekV2ForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding=sharding(cfg),
        hf_config=cfg.to_hf(),
        hf_architectures=("DeepseekV2ForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
