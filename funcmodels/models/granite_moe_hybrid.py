"""Granite 4 hybrid: Mamba-2 in most layers, attention without positions in some.

Features: the mixer of `models.mamba2` (arXiv:2405.21060) or grouped-query attention
(arXiv:2305.13245) in each layer, without rotary embeddings or with them (arXiv:2104.09864); a
shared SwiGLU feed-forward (arXiv:2002.05202), beside a mixture of experts (arXiv:1701.06538) where
there are any, of which the softmax is over the chosen ones; RMSNorm (arXiv:1910.07467); the
embedding, the scores of attention, each half before it joins the stream and the logits scaled by
constants (muP, arXiv:2203.03466), as in `models.granite`; tied or untied embeddings.
Paper: none for Granite 4; `transformers` modeling_granitemoehybrid.

As in `models.mamba2`, the norm of a mixer with several groups is over each of them, as in vLLM;
`transformers` takes it over all heads. Every published one has a single group.

Checked with: tiny random `transformers` models for each feature above; the configs of 4.0 H-350M,
H-Tiny, H-Small and Micro, which has attention alone. Published weights were not run.
Not supported: a layer without the shared feed-forward; quantised checkpoints; activations but SiLU.
The loss that balances the experts is the training's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import funcmodels as fm
from funcmodels import ops
from funcmodels.errors import ConfigError
from funcmodels.models import hf_config
from funcmodels.models.hf_config import RopeScaling, unless_given
from funcmodels.models.mamba2 import Mixer, mixer, mixer_params
from funcmodels.ops import einsum

# Names of layers in older configs -> those of transformers 5.
_LAYERS = {"mamba": "linear_attention", "attention": "full_attention"}


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "granitemoehybrid"
    LAYER_TYPES = ("linear_attention", "full_attention")
    LEAST_EXPERTS = 0
    ONLY = {
        "hidden_act": ("silu",),
        "attention_dropout": (0, 0.0),
        "mlp_bias": (False,),
        "normalization_function": ("rmsnorm",),
        "position_embedding_type": ("nope", "rope"),
    }
    READS = (
        "layers_block_type",
        "mamba_chunk_size",  # how it is computed, not what
        # Of training.
        "init_method",
        "output_router_logits",
        "router_aux_loss_coef",
    )

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    shared_intermediate_size: int = 1024
    num_hidden_layers: int
    layer_types: tuple[str, ...] = unless_given(
        lambda hf: ("linear_attention",) * hf["num_hidden_layers"]
    )
    num_attention_heads: int
    num_key_value_heads: int = unless_given(lambda hf: hf["num_attention_heads"])
    attention_bias: bool = False
    position_embedding_type: str = "nope"
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    mamba_n_heads: int
    mamba_d_head: int = unless_given(
        lambda hf: (hf.get("mamba_expand") or 2) * hf["hidden_size"] // hf["mamba_n_heads"]
    )
    mamba_n_groups: int = 1
    mamba_d_state: int
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    rms_norm_eps: float = 1e-6
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError where sizes contradict each other, or nothing is shared."""
        super().__post_init__()
        inner = self.mamba_expand * self.hidden_size
        if self.mixer.inner != inner:
            raise ConfigError(
                "two sizes of a mixer",
                got=f"mamba_expand * hidden_size = {inner}, "
                f"mamba_n_heads * mamba_d_head = {self.mixer.inner}",
                need="one size",
                fix=f"mamba_d_head={inner // self.mamba_n_heads}",
            )
        if self.shared_intermediate_size < 1:
            raise ConfigError(
                "models.granite_moe_hybrid has a shared feed-forward in every layer",
                got=f"shared_intermediate_size={self.shared_intermediate_size}",
                need="its size",
                fix="write a model file that leaves it out",
            )

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the names of layers that transformers has now, and no size that is to be found."""
        found = dict(hf)
        kinds = found.pop("layers_block_type", None) or found.get("layer_types")
        if kinds is not None:
            found["layer_types"] = [_LAYERS.get(kind, kind) for kind in kinds]
        if found.get("mamba_d_head") == "auto":
            del found["mamba_d_head"]
        return found

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def mixer(self) -> Mixer:
        return Mixer(
            heads=self.mamba_n_heads,
            head_dim=self.mamba_d_head,
            groups=self.mamba_n_groups,
            state=self.mamba_d_state,
            width=self.mamba_d_conv,
            eps=self.rms_norm_eps,
            bias=self.mamba_proj_bias,
            conv_bias=self.mamba_conv_bias,
            time_step_limit=self.time_step_limit,
        )


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a Granite 4, with their axes and the names of its checkpoints."""
    P = fm.axes(
        vocab=cfg.vocab_size,
        hidden=cfg.hidden_size,
        heads=cfg.num_attention_heads,
        kv_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        mlp=cfg.shared_intermediate_size,
        experts=cfg.num_local_experts or 1,
        expert_mlp=cfg.intermediate_size,
        **cfg.mixer.axes,
    )
    at = "model.layers.{layers}"
    kv = "(kv_heads head_dim)"

    def attention_params() -> dict[str, Any]:
        attn = f"{at}.self_attn"
        weights = {
            "q": P("heads head_dim hidden", hf=f"{attn}.q_proj.weight: (heads head_dim) hidden"),
            "k": P("kv_heads head_dim hidden", hf=f"{attn}.k_proj.weight: {kv} hidden"),
            "v": P("kv_heads head_dim hidden", hf=f"{attn}.v_proj.weight: {kv} hidden"),
            "o": P("hidden heads head_dim", hf=f"{attn}.o_proj.weight: hidden (heads head_dim)"),
        }
        if not cfg.attention_bias:
            return weights
        zeros = functools.partial(P, init="zeros")
        return weights | {
            "q_bias": zeros("heads head_dim", hf=f"{attn}.q_proj.bias: (heads head_dim)"),
            "k_bias": zeros("kv_heads head_dim", hf=f"{attn}.k_proj.bias: {kv}"),
            "v_bias": zeros("kv_heads head_dim", hf=f"{attn}.v_proj.bias: {kv}"),
            "o_bias": zeros("hidden", hf=f"{attn}.o_proj.bias"),
        }

    def halves(axis: str, size: int) -> tuple[str, str]:
        """Of gates and ups, one after the other in one tensor."""
        return f"{axis}[0:{size}/{2 * size}]", f"{axis}[{size}:{2 * size}/{2 * size}]"

    def mlp_params() -> dict[str, Any]:
        both, down = f"{at}.shared_mlp.input_linear.weight", f"{at}.shared_mlp.output_linear.weight"
        gates, ups = halves("mlp", cfg.shared_intermediate_size)
        return {
            "gate": P("mlp hidden", hf=f"{both}: {gates} hidden"),
            "up": P("mlp hidden", hf=f"{both}: {ups} hidden"),
            "down": P("hidden mlp", hf=down),
        }

    def mixture_params() -> dict[str, Any]:
        mixture = f"{at}.block_sparse_moe"
        both = f"{mixture}.input_linear.weight"
        gates, ups = halves("expert_mlp", cfg.intermediate_size)
        return {
            "router": P("experts hidden", hf=f"{mixture}.router.layer.weight"),
            "gate": P("experts expert_mlp hidden", hf=f"{both}: experts {gates} hidden"),
            "up": P("experts expert_mlp hidden", hf=f"{both}: experts {ups} hidden"),
            "down": P("experts hidden expert_mlp", hf=f"{mixture}.output_linear.weight"),
        }

    def layer(kind: str) -> dict[str, Any]:
        is_mixer = kind == "linear_attention"
        return {
            "input_norm": P("hidden", init="ones", hf=f"{at}.input_layernorm.weight"),
            **({"mixer": mixer_params(P, cfg.mixer, f"{at}.mamba")} if is_mixer else {}),
            **({"attn": attention_params()} if not is_mixer else {}),
            "post_norm": P("hidden", init="ones", hf=f"{at}.post_attention_layernorm.weight"),
            "mlp": mlp_params(),
            **({"mixture": mixture_params()} if cfg.num_local_experts else {}),
        }

    tree = {
        "embed": P("vocab hidden", hf="model.embed_tokens.weight"),
        "layers": [layer(kind) for kind in cfg.layer_types],
        "norm": P("hidden", init="ones", hf="model.norm.weight"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


@fm.block
def attention(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Grouped-query attention whose scores are scaled by `attention_multiplier`."""
    q = einsum(x, p["q"], "... e, h d e -> ... h d")  # (*batch, seq, heads, head_dim)
    k = einsum(x, p["k"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    v = einsum(x, p["v"], "... e, h d e -> ... h d")  # (*batch, seq, kv_heads, head_dim)
    if "q_bias" in p:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    if cfg.position_embedding_type == "rope":
        q, k = ops.rope(
            q,
            k,
            positions,
            theta=cfg.rope_theta,
            scaling=dict(cfg.rope_scaling) if cfg.rope_scaling else None,
            max_position=cfg.max_position_embeddings,
        )
    o = ops.attention(q, k, v, scale=cfg.attention_multiplier, segment_ids=segment_ids)
    out = einsum(o, p["o"], "... h d, e h d -> ... e")  # (*batch, seq, hidden)
    return out + p["o_bias"] if "o_bias" in p else out


@fm.block
def mlp(p: Any, x: Tensor):
    """The shared SwiGLU feed-forward: (*batch, seq, hidden) -> the same."""
    gate = einsum(x, p["gate"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    up = einsum(x, p["up"], "... e, f e -> ... f")  # (*batch, seq, mlp)
    return einsum(ops.swiglu(gate, up), p["down"], "... f, e f -> ... e")  # (*batch, seq, hidden)


@fm.block
def mixture(p: Any, x: Tensor, cfg: Config):
    """Each token by its k experts: (*batch, seq, hidden) -> the same."""
    logits = einsum(x, p["router"], "... e, x e -> ... x").float()  # (*batch, seq, experts)
    top, ids = logits.topk(cfg.num_experts_per_tok, dim=-1)  # (*batch, seq, k)
    weights = top.softmax(-1).to(x.dtype)
    return ops.experts(x, weights, ids, p["gate"], p["up"], p["down"], activation="silu")


@fm.block
def decoder_layer(p: Any, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cfg: Config):
    """Mixer or attention, and feed-forward, each on the normalised stream, scaled and added."""
    h = ops.rms_norm(x, p["input_norm"], eps=cfg.rms_norm_eps)
    if "mixer" in p:
        h = mixer(p["mixer"], h, segment_ids, cfg.mixer)
    else:
        h = attention(p["attn"], h, positions, segment_ids, cfg)
    x = x + h * cfg.residual_multiplier
    h = ops.rms_norm(x, p["post_norm"], eps=cfg.rms_norm_eps)
    out = mlp(p["mlp"], h)
    if "mixture" in p:
        out = mixture(p["mixture"], h, cfg) + out
    return x + out * cfg.residual_multiplier


def forward(
    params: Any,
    tokens: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    *,
    cfg: Config,
) -> Tensor:
    """Logits (*batch, seq, vocab) of tokens (*batch, seq); also (num_tokens,) -> (.., vocab)."""
    x = ops.embed(tokens, params["embed"]) * cfg.embedding_multiplier  # (*batch, seq, hidden)
    for p in params["layers"]:
        x = decoder_layer(p, x, positions, segment_ids, cfg)
    x = ops.rms_norm(x, params["norm"], eps=cfg.rms_norm_eps)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head) / cfg.logits_scaling  # (*batch, seq, vocab)


def told(cfg: Config) -> dict[str, Any]:
    """config.json as transformers tells it: what a served class compares its own with."""
    found = {key: value for key, value in cfg.to_hf().items() if key != "layers_block_type"}
    return found | {"layer_types": list(cfg.layer_types), "mamba_d_head": cfg.mamba_d_head}


def model(cfg: Config) -> fm.Model:
    """The Granite 4 of a config."""
    sharding: dict[str, str | None] = {"vocab": "tp", "mlp": "tp"}
    if cfg.num_local_experts:
        sharding |= {"expert_mlp": "tp", "experts": "ep"}
    if "full_attention" in cfg.layer_types:
        sharding |= {"heads": "tp", "kv_heads": "tp"}
    if "linear_attention" in cfg.layer_types:
        sharding |= cfg.mixer.sharding
    return fm.Model(
        "FmGraniteMoeHybridForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding=sharding,
        hf_config=told(cfg),
        hf_architectures=("GraniteMoeHybridForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
