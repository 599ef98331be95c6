"""What an emitted class refuses of the engine that it is built in, or warns of.

Copied into emitted files as it stands here; it may use the names that the file imports, and what
else is copied.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import CPUInt8ScaledMMLinearKernel
from vllm.platforms import current_platform


def check_config(vllm_config: VllmConfig, compiled_for: dict) -> None:
    """Refuse a folder whose config.json is not the one this file was compiled for."""
    config = vllm_config.model_config.hf_text_config  # of a model of text and images, its own part
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" not in compiled_for.get("rope_parameters", {}):
        rope = rope.get("full_attention") or rope  # one for each type of layer, spelled as one
    wrong = []
    for name, want in compiled_for.items():
        got = getattr(config, name, None)
        if name == "rope_theta" and rope:
            got = rope.get(name)
        if name == "rope_parameters":  # the base stands for itself, and may stand elsewhere
            got = {k: rope.get(k, v) for k, v in want.items()}
            got["rope_type"] = rope.get("rope_type", "default")
        if name == "tie_word_embeddings":  # vLLM unties where the checkpoint has both tensors
            got = got or vllm_config.model_config.word_embeddings_untied_by_checkpoint
        if got is not None and got != want:
            wrong.append(f"{name}={got}, compiled for {want}")
    if wrong:
        raise ValueError(
            "this model class was compiled for another config.json\n"
            f"  got:  {'; '.join(wrong)}\n"
            "  fix:  compile the model of this folder, and register that class"
        )


def check_generates(vllm_config: VllmConfig) -> None:
    """Refuse to be run for embeddings: vLLM would take hidden states that nobody declared."""
    if vllm_config.model_config.runner_type == "pooling":
        raise ValueError(
            "this model was compiled to generate tokens\n"
            "  got:  runner='pooling'\n"
            "  fix:  fm.Model(..., task='embed', pooling=...), whose forward returns hidden states"
        )


def check_pools(vllm_config: VllmConfig, pooling: str, attention: str) -> None:
    """Refuse an engine that would pool, or cut prompts, otherwise than this model was declared."""
    config = vllm_config.model_config
    pooler, wrong = config.pooler_config, None
    if config.runner_type != "pooling" or pooler is None:
        wrong = f"runner={config.runner_type!r}, need 'pooling'"
    elif pooler.seq_pooling_type != pooling:
        wrong = f"seq_pooling_type={pooler.seq_pooling_type!r}, compiled for {pooling!r}"
    elif attention == "encoder_only" != config.attn_type:
        wrong = f"attn_type={config.attn_type!r}, compiled for {attention!r}"
    if wrong:
        raise ValueError(
            "this model class was compiled for another way of pooling\n"
            f"  got:  {wrong}\n"
            "  fix:  LLM(folder, runner='pooling'), of a model that fm.register was given, "
            "without a pooler_config of its own"
        )


def check_registered(cls: type, vllm_config: VllmConfig) -> None:
    """Refuse to be built in the place of a class registered later under the same name.

    vLLM remembers the class of a path and a name: the old one would be served silently.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    name = vllm_config.model_config.architecture
    latest = ModelRegistry.models[name].load_model_cls() if name in ModelRegistry.models else cls
    if hasattr(latest, "compiled_by") and latest is not cls:
        raise ValueError(
            f"{name} was registered again after this process had loaded it, "
            "and vLLM kept the first class\n"
            "  fix:  register the new class under a new name, with "
            'hf_overrides={"architectures": ["NewName"]}, or start a new process'
        )


def check_ranks(*axes: tuple[str, int, bool]) -> None:
    """Refuse a tensor-parallel size that the model's axes do not allow."""
    ranks = get_tensor_model_parallel_world_size()
    for axis, size, exact in axes:
        if size % ranks and (exact or ranks % size):
            how = "divides it" if exact else "divides it, or is a multiple of it"
            raise ValueError(
                f"cannot split axis {axis!r} over mesh axis 'tp'\n"
                f"  got:  {axis}={size}, tp={ranks}\n"
                f"  need: a tensor_parallel_size that {how}"
            )


def check_experts(vllm_config: VllmConfig, hidden: int, mlp: int, *, is_summed: bool) -> None:
    """Refuse experts that vLLM's kernels would compute wrongly, or crash on.

    Args:
        mlp: the size that must divide, of one expert; 0 where it is padded.
        is_summed: whether the layer itself takes the sum over the ranks.
    """
    parallel = vllm_config.parallel_config
    if parallel.enable_expert_parallel:
        if current_platform.is_cpu():
            raise ValueError(
                "vLLM's experts crash on a CPU when they are divided over the ranks\n"
                "  got:  enable_expert_parallel=True\n"
                "  fix:  enable_expert_parallel=False: each rank has a part of every expert"
            )
        if parallel.data_parallel_size > 1 and not is_summed:
            raise ValueError(
                "this model sums its experts with another layer before it does so over the ranks\n"
                f"  got:  enable_expert_parallel=True, "
                f"data_parallel_size={parallel.data_parallel_size}\n"
                "  fix:  data_parallel_size=1"
            )
    if current_platform.is_cpu() and vllm_config.lora_config is not None:
        raise ValueError(
            "vLLM has no kernel for experts beside LoRA adapters on a CPU\n"
            "  got:  enable_lora=True\n"
            "  fix:  merge the adapter into the weights, or another device"
        )
    local = mlp // get_tensor_model_parallel_world_size()
    if current_platform.is_cpu() and (hidden % 32 or local % 32):
        raise ValueError(
            "vLLM's experts on a CPU need sizes that 32 divides\n"
            f"  got:  hidden {hidden}"
            + (f", {local} of an expert on each rank\n" if mlp else "\n")
            + "  fix:  a model of such sizes, or another device"
        )


def check_full_attention(vllm_config: VllmConfig) -> None:
    """Refuse a sliding window of config.json over a model that attends to all tokens."""
    window = vllm_config.cache_config.sliding_window
    if window is not None:
        raise ValueError(
            f"config.json sets sliding_window={window}, "
            "but this model attends to all tokens\n"
            "  fix:  set sliding_window to null in config.json, "
            "or pass window= to ops.attention"
        )


def check_dtype(vllm_config: VllmConfig, dtype: torch.dtype) -> None:
    """Refuse another dtype than that of the values which attention is given."""
    served = vllm_config.model_config.dtype
    if served != dtype:
        raise ValueError(
            f"this model attends to values of {dtype}, and the engine caches them in its own\n"
            f"  got:  dtype={served}\n"
            f"  fix:  dtype={str(dtype).removeprefix('torch.')!r}, or cast q, k and v back before "
            "ops.rope and ops.attention"
        )


def check_embeds(vllm_config: VllmConfig, dtype: torch.dtype) -> None:
    """Refuse prompts as embeddings where the engine would round them to its own dtype."""
    served = vllm_config.model_config.dtype
    if vllm_config.model_config.enable_prompt_embeds and served != dtype:
        raise ValueError(
            f"this model embeds tokens in {dtype}, and the engine hands others over in its own\n"
            f"  got:  dtype={served}, enable_prompt_embeds=True\n"
            f"  fix:  dtype={str(dtype).removeprefix('torch.')!r}, or enable_prompt_embeds=False"
        )


def check_tokens_given(vllm_config: VllmConfig) -> None:
    """Refuse prompts as embeddings for a model that reads the tokens themselves."""
    if vllm_config.model_config.enable_prompt_embeds:
        raise ValueError(
            "this model reads the tokens in other ways than one embedding\n"
            "  got:  enable_prompt_embeds=True: prompts that may have no tokens\n"
            "  fix:  enable_prompt_embeds=False, and prompts as token ids"
        )


def check_keys_cached(vllm_config: VllmConfig) -> None:
    """Refuse an engine that caches latents for a model that makes keys and values itself."""
    if vllm_config.model_config.use_mla:
        raise ValueError(
            "by config.json the engine caches latents, "
            "but this model attends to keys and values\n"
            "  fix:  VLLM_MLA_DISABLE=1 in the environment, or use ops.latent_attention"
        )


def check_one_stage(vllm_config: VllmConfig, why: str) -> None:
    """Refuse pipeline stages for a model that cannot be cut into them."""
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ValueError(
            f"this model cannot be cut into {stages} pipeline stages: {why}\n"
            "  fix:  pipeline_parallel_size=1, with more tensor_parallel_size instead; or one list "
            "of layers,\n        each called with what the one before returned, and positions"
        )


def check_length(vllm_config: VllmConfig, limit: int, rope_type: str) -> None:
    """Refuse lengths at which this rope turns cached keys otherwise than new ones."""
    length = vllm_config.model_config.max_model_len
    if length > limit:
        raise ValueError(
            f"rope type {rope_type!r} depends on the length of the whole sequence "
            f"above {limit} tokens, which a KV cache cannot follow\n"
            f"  got:  max_model_len={length}\n"
            f"  fix:  max_model_len={limit}"
        )


def check_positions(vllm_config: VllmConfig, limit: int) -> None:
    """Refuse lengths past the end of the table of angles: it would be read there all the same."""
    length = vllm_config.model_config.max_model_len
    if length > limit:
        raise ValueError(
            f"the rope of this model has angles for {limit} positions\n"
            f"  got:  max_model_len={length}\n"
            f"  fix:  max_model_len={limit}"
        )


def warn_length(vllm_config: VllmConfig, limit: int, rope_type: str) -> None:
    """Say where this rope differs: the engine fixes one set of factors for all."""
    if vllm_config.model_config.max_model_len > limit:
        init_logger(__name__).warning(
            "rope type %r: with max_model_len above %d the engine uses the factors for "
            "long sequences for all requests, short too; max_model_len=%d is exact",
            rope_type,
            limit,
            limit,
        )


def warn_int8(model: nn.Module) -> None:
    """Say where products of int8 are wrong: without VNNI, their sums are cut off at 16 bits."""
    scheme = {name: getattr(module, "scheme", None) for name, module in model.named_modules()}
    kernel = {name: getattr(found, "kernel", None) for name, found in scheme.items()}
    layers = [n for n, k in kernel.items() if isinstance(k, CPUInt8ScaledMMLinearKernel)]
    has = torch.cpu.get_capabilities()
    vnni = has.get("avx512_vnni", False) or has.get("avx_vnni", False)
    if layers and has["architecture"] == "x86_64" and not vnni:
        init_logger(__name__).warning_once(
            "int8 on a processor without VNNI: vLLM's kernel cuts sums of products off at 16 bits, "
            "in its own classes too, and results are wrong\n"
            "  got:  %d layers, as %s\n"
            "  need: avx512_vnni or avx_vnni among the flags of /proc/cpuinfo\n"
            "  fix:  serve on such a processor, or a checkpoint in float8",
            len(layers),
            layers[0],
        )
