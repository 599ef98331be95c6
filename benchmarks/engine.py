"""The small engine that the benchmarks start."""

from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 256 << 20,
    "disable_log_stats": True,
}


def start(folder: Path, **changes: Any) -> Any:
    """An engine of a folder, with some settings changed."""
    from vllm import LLM

    return LLM(model=str(folder), **{**SETTINGS, **changes})
