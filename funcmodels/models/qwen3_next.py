"""Qwen3-Next: a recurrent memory in most layers, gated attention in some, and many small experts.

Features: RMSNorm (arXiv:1910.07467) whose weights are stored minus 1; in most layers the gated
delta rule (arXiv:2412.06464), whose queries, keys and values a causal convolution of a few tokens
mixes, and whose heads of values share the keys in groups; in the others grouped-query attention
(arXiv:2305.13245) with QK norm, RoPE (arXiv:2104.09864) on the first part of each head, and a gate
for each feature of a head (arXiv:2505.06708); a router that takes the softmax over all experts and
the k largest of it, and beside them an expert of every token, with a gate of its own; layers in
between with a dense feed-forward, as `decoder_sparse_step` and `mlp_only_layers` say.
Paper: Qwen3, arXiv:2505.09388; its authors describe this model in a blog post alone.

The tensors of a checkpoint hold queries, keys, values and gates head by head of the keys. Each is a
parameter of its own here, so each rank has whole heads of keys, with all that share them.

Checked with: tiny random `transformers` models for each feature above; the configs of
80B-A3B-Instruct and of Coder-Next. Published weights were not run.
Not supported: the layers that predict a further token (`mtp.*` is passed over), quantised
checkpoints, attention dropout, activations but SiLU. The loss that balances the experts is the
training's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import ConfigError
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.models.qwen3 import mlp
from funcmodels.models.qwen3_moe import mixture as routed
from funcmodels.ops import einsum


def _layer_types(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Attention in the last of every few layers."""
    every = hf.get("full_attention_interval") or 4
    layers = range(1, hf["num_hidden_layers"] + 1)
    return tuple("linear_attention" if i % every else "full_attention" for i in layers)


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "qwen3_next"
    LAYER_TYPES = ("full_attention", "linear_attention")
    ONLY = {
        "hidden_act": ("silu",),
        "attention_dropout": (0, 0.0),
        "use_sliding_window": (False,),
    }
    # The first gives the layers' types; the others weigh and report a loss.
    READS = ("full_attention_interval", "output_router_logits", "router_aux_loss_coef")

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_conv_kernel_dim: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    layer_types: tuple[str, ...] = unless_given(_layer_types)
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 0.25
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError where heads of values cannot share those of keys."""
        super().__post_init__()
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ConfigError(
                "heads of values cannot be grouped over the heads of keys",
                got=f"linear_num_value_heads={self.linear_num_value_heads}, "
                f"linear_num_key_heads={self.linear_num_key_heads}",
                need="linear_num_key_heads divides linear_num_value_heads",
                fix=f"linear_num_key_heads={self.linear_num_value_heads}",
            )

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """transformers 5 adds a `partial_rotary_factor` of 0.25 beside that of `rope_parameters`,
        which counts.
        """
        plain = dict(hf)
        if (hf.get("rope_parameters") or {}).get("partial_rotary_factor") is not None:
            plain.pop("partial_rotary_factor", None)
        return plain

    @property
    def group(self) -> int:
        """How many heads of values share one of keys."""
        return self.linear_num_value_heads // self.linear_num_key_heads

    def mixes(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


def A_log(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:  # noqa: N802
    """Logarithms of values between 0.01 and 16, evenly: heads forget at different paces."""
    return (0.01 + 15.99 * torch.rand(shape, generator=generator)).log()


def dt_shift(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Where softplus is between 0.001 and 0.1, evenly in the logarithm."""
    low, high = math.log(0.001), math.log(0.1)
    dt = (low + (high - low) * torch.rand(shape, generator=generator)).exp()
    return dt + torch.log(-torch.expm1(-dt))


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a Qwen3-Next, with their axes and the names of its checkpoints."""
    key_heads, key_dim, group = cfg.linear_num_key_heads, cfg.linear_key_head_dim, cfg.group
    keys, values = key_heads * key_dim, group * cfg.linear_value_head_dim
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        kv_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        key_heads=key_heads,
        key_dim=key_dim,
        group=group,
        value_dim=cfg.linear_value_head_dim,
        values=values,  # of all heads that share one of keys
        width=cfg.linear_conv_kernel_dim,
        mlp=cfg.intermediate_size,
        experts=cfg.num_experts,
        expert_mlp=cfg.moe_intermediate_size,
        shared_mlp=cfg.shared_expert_intermediate_size,
    )
    zeros = functools.partial(P, init="zeros")  # norms' too: they hold weight - 1
    at = "model.layers.{layers}"
    attn, linear, ffn = f"{at}.self_attn", f"{at}.linear_attn", f"{at}.mlp"
    kv, d = "(kv_heads head_dim)", cfg.head_dim
    # Of the rows of each head, the first half is a query's and the other its gate's.
    query, gate = (f"(heads head_dim[{i * d}:{(i + 1) * d}/{2 * d}])" for i in range(2))

    def attention_params() -> dict[str, Any]:
        weights = {
            "q": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: {query} hidden"),
            "gate": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: {gate} hidden"),
            "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
            "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
            "o": P("hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden (heads head_dim)"),
            "q_norm": zeros("head_dim", hf=f"{attn}.q_norm.weight"),
            "k_norm": zeros("head_dim", hf=f"{attn}.k_norm.weight"),
        }
        if not cfg.attention_bias:
            return weights
        return weights | {
            "q_bias": zeros("heads head_dim", hf=f"{attn}.q_proj.bias: {query}"),
            "gate_bias": zeros("heads head_dim", hf=f"{attn}.q_proj.bias: {gate}"),
            "k_bias": zeros("kv_heads head_dim", hf=f"{attn}.k_proj.bias: {kv}"),
            "v_bias": zeros("kv_heads head_dim", hf=f"{attn}.v_proj.bias: {kv}"),
            "o_bias": zeros("hidden", hf=f"{attn}.o_proj.bias"),
        }

    def delta_rule_params() -> dict[str, Any]:
        qkvz, ba, conv = (f"{linear}.{n}.weight" for n in ("in_proj_qkvz", "in_proj_ba", "conv1d"))
        n, a = 2 * (key_dim + values), 2 * key_dim + values  # a head's rows; those before the gate
        every = 2 * keys + key_heads * values
        out = "hidden (key_heads group value_dim)"

        def part(axis: str, start: int, stop: int, whole: int) -> str:
            return f"(key_heads {axis}[{start}:{stop}/{whole}])"

        def convolved(axis: str, start: int, stop: int) -> Any:
            layout = f"(key_heads {axis})[{start}:{stop}/{every}] 1 width"
            return P(f"key_heads {axis} width", hf=f"{conv}: {layout}")

        rows = {
            "q": ("key_dim", part("key_dim", 0, key_dim, n)),
            "k": ("key_dim", part("key_dim", key_dim, 2 * key_dim, n)),
            "v": ("values", part("values", 2 * key_dim, a, n)),
            "z": ("values", part("values", a, n, n)),
        }
        return {
            name: P(f"key_heads {axis} hidden", hf=f"{qkvz}: {layout} hidden")
            for name, (axis, layout) in rows.items()
        } | {
            "beta": P(
                "key_heads group hidden", hf=f"{ba}: {part('group', 0, group, 2 * group)} hidden"
            ),
            "dt": P(
                "key_heads group hidden",
                hf=f"{ba}: {part('group', group, 2 * group, 2 * group)} hidden",
            ),
            "q_conv": convolved("key_dim", 0, keys),
            "k_conv": convolved("key_dim", keys, 2 * keys),
            "v_conv": convolved("values", 2 * keys, every),
            "dt_shift": P(
                "key_heads group", init=dt_shift, hf=f"{linear}.dt_bias: (key_heads group)"
            ),
            "A_log": P("key_heads group", init=A_log, hf=f"{linear}.A_log: (key_heads group)"),
            "norm": P("value_dim", init="ones", hf=f"{linear}.norm.weight"),
            "out": P("hidden key_heads group value_dim", hf=f"{linear}.out_proj.weight: {out}"),
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
            "shared": mlp_params(f"{ffn}.shared_expert", "shared_mlp"),
            "shared_gate": P("hidden", hf=f"{ffn}.shared_expert_gate.weight: 1 hidden"),
        }

    def layer(index: int, kind: str) -> dict[str, Any]:
        mixer = (
            {"attn": attention_params()}
            if kind == "full_attention"
            else {"delta_rule": delta_rule_params()}
        )
        return {
            "input_norm": zeros("hidden", hf=f"{at}.input_layernorm.weight"),
            **mixer,
            "post_norm": zeros("hidden", hf=f"{at}.post_attention_layernorm.weight"),
            "mlp": mixture_params() if cfg.mixes(index) else mlp_params(ffn, "mlp"),
        }

    tree = {
        "embed": P("vocab hidden", hf="model.embed_tokens.weight"),
        "layers": [layer(index, kind) for index, kind in enumerate(cfg.layer_types)],
        "norm": zeros("hidden", hf="model.norm.weight"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Grouped-query attention, of which each feature is gated: (*batch, seq, hidden) -> same."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    gate = einsum(x, p["gate"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    if "q_bias" in p:
        q, gate = q + p["q_bias"], gate + p["gate_bias"]
        k, v = k + p["k_bias"], v + p["v_bias"]
    q = ops.rms_norm(q, p["q_norm"], eps=cfg.rms_norm_eps, offset=1.0)
    k = ops.rms_norm(k, p["k_norm"], eps=cfg.rms_norm_eps, offset=1.0)
    q, k = ops.rope(
        q,
        k,
        positions,
        theta=cfg.rope_theta,
        scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
        max_position=cfg.max_position_embeddings,
        rotary_dim=int(cfg.head_dim * cfg.partial_rotary_factor),
    )
    o = ops.attention(q, k, v, segment_ids=segment_ids) * gate.sigmoid()
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def delta_rule(p: Any, x: Tensor, segment_ids: Tensor | None, cfg: Config):
    """The gated delta rule between a short convolution and a gated norm: (*, hidden) -> same."""
    key_dim, value_dim = cfg.linear_key_head_dim, cfg.linear_value_head_dim
    widths = [key_dim, key_dim, cfg.group * value_dim]  # of one head of keys
    q, k, v = (einsum(x, p[name], "... e, h d e -> ... h d") for name in "qkv")
    z = einsum(x, p["z"], "... e, h d e -> ... h d")  # (*batch, seq, key_heads, values)
    mixed = torch.cat([q, k, v], dim=-1).flatten(-2)  # (*batch, seq, channels), by heads of keys
    taps = torch.cat([p["q_conv"], p["k_conv"], p["v_conv"]], dim=1).flatten(0, 1)
    mixed = ops.short_conv(mixed, taps, segment_ids=segment_ids)
    mixed = F.silu(mixed).unflatten(-1, (-1, sum(widths)))
    q, k, v = mixed.split(widths, dim=-1)  # (*batch, seq, key_heads, key_dim or values)

    # fp32: a decay is a product over many tokens.
    dt = einsum(x, p["dt"], "... e, h g e -> ... h g").float() + p["dt_shift"].float()
    log_decay = -p["A_log"].float().exp() * F.softplus(dt)  # (*batch, seq, key_heads, group)
    beta = einsum(x, p["beta"], "... e, h g e -> ... h g").sigmoid()
    y = ops.gated_delta_rule(
        q.repeat_interleave(cfg.group, dim=-2),
        k.repeat_interleave(cfg.group, dim=-2),
        v.unflatten(-1, (cfg.group, value_dim)).flatten(-3, -2),
        log_decay.flatten(-2),
        beta.flatten(-2),
        scale=key_dim**-0.5,
        normalise=True,
        segment_ids=segment_ids,
    )  # (*batch, seq, value_heads, value_dim)
    y = ops.rms_norm(y, p["norm"], eps=cfg.rms_norm_eps).unflatten(-2, (-1, cfg.group))
    y = (y * F.silu(z.float()).unflatten(-1, (cfg.group, value_dim))).to(x.dtype)
    return einsum(y, p["out"], "... h g d, e h g d -> ... e")  # (*batch, seq, hidden)


@fm.block
def mixture(p: Any, x: Tensor, cfg: Config):
    """Each token by its k experts, and by one of all tokens, gated: (*, hidden) -> the same."""
    gate = einsum(x, p["shared_gate"], "... e, e -> ...").sigmoid()  # (*batch, seq)
    return routed(p, x, cfg) + gate[..., None] * mlp(p["shared"], x)


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Attention or the delta rule, and experts: each on the normalised stream, added to it."""
    h = ops.rms_norm(x, p["input_norm"], eps=cfg.rms_norm_eps, offset=1.0)
    if "attn" in p:
        x = x + attention(p["attn"], h, positions, segment_ids, cfg)
    else:
        x = x + delta_rule(p["delta_rule"], h, segment_ids, cfg)
    h = ops.rms_norm(x, p["post_norm"], eps=cfg.rms_norm_eps, offset=1.0)
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
    x = ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps, offset=1.0)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The Qwen3-Next of a config."""
    mixed = [cfg.mixes(index) for index in range(cfg.num_hidden_layers)]
    sharding: dict[str, str | None] = {"vocab": "tp"}
    if "full_attention" in cfg.layer_types:
        sharding |= {"heads": "tp", "kv_heads": "tp"}
    if "linear_attention" in cfg.layer_types:
        sharding |= {"key_heads": "tp"}
    if any(mixed):
        sharding |= {"expert_mlp": "tp", "shared_mlp": "tp", "experts": "ep"}
    if not all(mixed):
        sharding |= {"mlp": "tp"}
    return fm.Model(
        "FmQwen3NextForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding=sharding,
        hf_config=cfg.to_hf(),
        hf_architectures=("Qwen3NextForCausalLM",),
        hf_ignored=("mtp.*",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
