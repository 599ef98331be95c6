"""Mamba-2: state-space layers alone, no attention.

Features: RMSNorm (arXiv:1910.07467) before each mixer; a mixer that projects to a gate z, to x, B
and C, which a causal convolution of a few tokens mixes, and to step sizes dt; the state-space
recurrence of one decay a head, with groups of heads that share B and C; a norm of its result times
silu(z); the residual sum in float32 or not; tied or untied embeddings.
Paper: Mamba-2, arXiv:2405.21060.

`in_proj` and `conv1d` of a checkpoint hold z, x, B, C and dt one after the other. Here each is a
parameter of its own, but for B and C of one group, which are one. Each of x, B and C, or the two
together, has a convolution and its state. So a rank has whole groups with their heads, or some
heads of a group that all ranks have the B and C of. Several groups that the ranks do not divide are
refused.

The norm is over each group of heads, as in the authors' mamba_ssm, of which Codestral is, and in
vLLM; `transformers` takes it over all heads, which is the same with one group alone.

Checked with: tiny random `transformers` models for each feature above; the configs of 130M,
2.7B and Codestral 7B. Published weights were not run.
Not supported: `norm_before_gate`, which `transformers` passes over too; quantised checkpoints. When
it decodes, `transformers` forgets `time_step_limit`; here it holds for every token.
"""

from __future__ import annotations

import functools
import itertools
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


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """Sizes of a mixer and what it does, whatever a model's config calls them."""

    heads: int
    head_dim: int
    groups: int
    state: int
    width: int
    eps: float
    bias: bool
    conv_bias: bool
    time_step_limit: tuple[float, float]

    def __post_init__(self) -> None:
        """Raises ConfigError where groups do not divide the heads, or limits are no two numbers."""
        if self.heads % self.groups:
            raise ConfigError(
                "heads of the state cannot be grouped",
                got=f"{self.heads} heads, {self.groups} groups of B and C",
                need="groups that divide the heads",
                fix="1 group",
            )
        if len(self.time_step_limit) != 2 or self.width < 2:
            raise ConfigError(
                "a mixer has two limits of its step sizes, and convolves two tokens at least",
                got=f"time_step_limit={self.time_step_limit}, a convolution of {self.width}",
                need="a smallest and a largest step size",
                fix="time_step_limit=[0.0, inf], and 4 tokens",
            )

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def blocks(self) -> int:
        """Of what a rank has whole ones: groups with their heads; of a group alone, heads."""
        return self.groups if self.groups > 1 else self.heads

    @property
    def axes(self) -> dict[str, int]:
        """Axes of a mixer's parameters, with their sizes, but `hidden`."""
        return {
            "blocks": self.blocks,
            "block_heads": self.heads // self.blocks,
            "block_channels": self.inner // self.blocks,
            "pair": 2,
            "state": self.state,
            "width": self.width,
        }

    @property
    def sharding(self) -> dict[str, str]:
        return {"blocks": "tp"}


@dataclass(frozen=True, kw_only=True)
class Config(hf_config.ZooConfig):
    """Sizes and features, in Hugging Face's spelling."""

    MODEL_TYPE = "mamba2"
    ONLY = {"hidden_act": ("silu",), "rms_norm": (True,)}
    READS = (
        "intermediate_size",
        "norm_before_gate",  # transformers does not look at it, whatever it says
        "chunk_size",  # how it is computed, not what
        # Of training's first step.
        "rescale_prenorm_residual",
        "time_step_rank",
        "time_step_min",
        "time_step_max",
        "time_step_floor",
        "time_step_init_scheme",
        "time_step_scale",
    )

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    head_dim: int
    expand: int = 2
    state_size: int
    n_groups: int
    conv_kernel: int = 4
    layer_norm_epsilon: float = 1e-5
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    residual_in_fp32: bool = True
    use_bias: bool = False
    use_conv_bias: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError where sizes of the mixer contradict each other."""
        super().__post_init__()
        inner = self.expand * self.hidden_size
        given = (self.hf or {}).get("intermediate_size")
        if self.mixer.inner != inner or given not in (None, inner):
            raise ConfigError(
                "two sizes of a mixer",
                got=f"expand * hidden_size = {inner}, num_heads * head_dim = {self.mixer.inner}"
                + (f", intermediate_size={given}" if given else ""),
                need="one size",
                fix=f"num_heads={inner // self.head_dim}",
            )

    @property
    def mixer(self) -> Mixer:
        return Mixer(
            heads=self.num_heads,
            head_dim=self.head_dim,
            groups=self.n_groups,
            state=self.state_size,
            width=self.conv_kernel,
            eps=self.layer_norm_epsilon,
            bias=self.use_bias,
            conv_bias=self.use_conv_bias,
            time_step_limit=self.time_step_limit,
        )


def mixer_params(P: Any, sizes: Mixer, at: str) -> dict[str, Any]:
    """The parameters of a mixer, whose tensors of the checkpoint begin with `at`.

    Args:
        P: declares over `sizes.axes` and `hidden`.
    """
    channels, heads = "blocks block_channels", "blocks block_heads"
    shared = {"bc": "pair state"}
    if sizes.groups > 1:  # all of B is stored before all of C, and each is cut
        shared = dict.fromkeys("bc", "blocks state")
    axes = {"z": channels, "x": channels, **shared, "dt": heads}
    projected = _rows(sizes, axes)
    convolved = _rows(sizes, {"x": channels, **shared})
    zeros = functools.partial(P, init="zeros")
    weights = {
        name: P(f"{axes[name]} hidden", hf=f"{at}.in_proj.weight: {rows} hidden")
        for name, rows in projected.items()
    } | {
        f"{name}_conv": P(f"{axes[name]} width", hf=f"{at}.conv1d.weight: {rows} 1 width")
        for name, rows in convolved.items()
    }
    if sizes.bias:
        weights |= {
            f"{name}_bias": zeros(axes[name], hf=f"{at}.in_proj.bias: {rows}")
            for name, rows in projected.items()
        }
        weights["out_bias"] = zeros("hidden", hf=f"{at}.out_proj.bias")
    if sizes.conv_bias:
        weights |= {
            f"{name}_conv_bias": zeros(axes[name], hf=f"{at}.conv1d.bias: {rows}")
            for name, rows in convolved.items()
        }
    return weights | {
        "dt_shift": P(heads, init=dt_shift, hf=f"{at}.dt_bias: ({heads})"),
        "A_log": P(heads, init=A_log, hf=f"{at}.A_log: ({heads})"),
        "D": P(heads, init="ones", hf=f"{at}.D: ({heads})"),
        "gate_norm": P(channels, init="ones", hf=f"{at}.norm.weight: ({channels})"),
        "out": P(f"hidden {channels}", hf=f"{at}.out_proj.weight: hidden ({channels})"),
    }


def _rows(sizes: Mixer, parts: Mapping[str, str]) -> dict[str, str]:
    """Of parts of one tensor that follow each other, given by their axes: the rows of each."""
    counts = {name: math.prod(sizes.axes[a] for a in axes.split()) for name, axes in parts.items()}
    whole, ends = sum(counts.values()), itertools.accumulate(counts.values())
    return {
        name: f"({axes})[{end - counts[name]}:{end}/{whole}]"
        for (name, axes), end in zip(parts.items(), ends, strict=True)
    }


def A_log(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:  # noqa: N802
    """Logarithms of 1 to the number of heads: they forget at different paces."""
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float32).log().view(shape)


def dt_shift(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Where softplus is between 0.001 and 0.1, evenly in the logarithm."""
    low, high = math.log(0.001), math.log(0.1)
    dt = (torch.rand(shape, generator=generator) * (high - low) + low).exp()
    return dt + torch.log(-torch.expm1(-dt))


def mix(p: Any, x: Tensor, segment_ids: Tensor | None, sizes: Mixer) -> Tensor:
    """A mixer: (*batch, seq, hidden) -> the same."""
    z = _project(p, x, "z")  # (*batch, seq, inner)
    dt = _project(p, x, "dt").float() + p["dt_shift"].float().flatten()  # (*batch, seq, heads)
    dt = F.softplus(dt)
    if sizes.time_step_limit != (0.0, math.inf):
        dt = dt.clamp(*sizes.time_step_limit)
    # float32 from here to the norm, as in transformers; the engine's kernel wants one dtype of all.
    u, *bc = (
        F.silu(
            ops.short_conv(
                _project(p, x, name),
                p[f"{name}_conv"].flatten(0, -2),
                p[f"{name}_conv_bias"].flatten() if sizes.conv_bias else None,
                segment_ids=segment_ids,
            )
        ).float()
        for name in ("x", *(["bc"] if sizes.groups == 1 else "bc"))
    )
    b, c = bc if sizes.groups > 1 else bc[0].chunk(2, dim=-1)
    y = ops.ssd(
        u.unflatten(-1, (sizes.heads, sizes.head_dim)),
        dt,
        -p["A_log"].float().flatten().exp(),
        b.unflatten(-1, (sizes.groups, sizes.state)),
        c.unflatten(-1, (sizes.groups, sizes.state)),
        D=p["D"].float().flatten(),
        segment_ids=segment_ids,
    )  # (*batch, seq, heads, head_dim)
    y = y.flatten(-2) * F.silu(z.float())
    y = group_norm(y, p["gate_norm"].float().flatten(), sizes).to(x.dtype)
    return F.linear(y, p["out"].flatten(1), p.get("out_bias"))  # (*batch, seq, hidden)


def group_norm(x: Tensor, weight: Tensor, sizes: Mixer) -> Tensor:
    """RMSNorm over the heads of each group: (*batch, seq, inner) -> the same."""
    if sizes.groups == 1:
        return ops.rms_norm(x, weight, eps=sizes.eps)
    grouped = x.unflatten(-1, (sizes.groups, -1))
    unit = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + sizes.eps)
    return unit.flatten(-2) * weight


def _project(p: Any, x: Tensor, name: str) -> Tensor:
    """One part of in_proj: (*batch, seq, hidden) -> (*batch, seq, its size); rounded once."""
    bias = p[f"{name}_bias"].flatten() if f"{name}_bias" in p else None
    return F.linear(x, p[name].flatten(0, -2), bias)


mixer = fm.block(mix)


def params(cfg: Config) -> dict[str, Any]:
    """The parameters of a Mamba-2, with their axes and the names of its checkpoints."""
    P = fm.axes(vocab=cfg.vocab_size, hidden=cfg.hidden_size, **cfg.mixer.axes)
    at = "backbone.layers.{layers}"

    def layer() -> dict[str, Any]:
        return {
            "norm": P("hidden", init="ones", hf=f"{at}.norm.weight"),
            "mixer": mixer_params(P, cfg.mixer, f"{at}.mixer"),
        }

    tree = {
        "embed": P("vocab hidden", hf="backbone.embeddings.weight"),
        "layers": [layer() for _ in range(cfg.num_hidden_layers)],
        "norm": P("hidden", init="ones", hf="backbone.norm_f.weight"),
    }
    if not cfg.tie_word_embeddings:
        tree["head"] = P("vocab hidden", hf="lm_head.weight")
    return tree


@fm.block
def decoder_layer(p: Any, x: Tensor, segment_ids: Tensor | None, cfg: Config):
    """A mixer on the normalised stream, added to it."""
    h = ops.rms_norm(x.to(p["norm"].dtype), p["norm"], eps=cfg.layer_norm_epsilon)
    return x + mixer(p["mixer"], h, segment_ids, cfg.mixer)


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
    dtype = x.dtype
    if cfg.residual_in_fp32:
        x = x.float()
    for p in params["layers"]:
        x = decoder_layer(p, x, segment_ids, cfg)
    x = ops.rms_norm(x, params["norm"], eps=cfg.layer_norm_epsilon).to(dtype)
    head = params["embed"] if cfg.tie_word_embeddings else params["head"]
    return ops.unembed(x, head)  # (*batch, seq, vocab)


def model(cfg: Config) -> fm.Model:
    """The Mamba-2 of a config."""
    return fm.Model(
        "FmMamba2ForCausalLM",
        config=cfg,
        params=params(cfg),
        forward=functools.partial(forward, cfg=cfg),
        sharding={"vocab": "tp", **cfg.mixer.sharding},
        hf_config=cfg.to_hf(),
        hf_architectures=("Mamba2ForCausalLM",),
        hf_tied={"lm_head.weight": "embed"} if cfg.tie_word_embeddings else {},
    )
