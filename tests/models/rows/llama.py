"""Llama; its config and its variations have tests of their own in tests/models/test_llama.py."""

from typing import Any

from tests.models.rows import llama_classifier
from tests.models.zoo import Published, Row


def without_labels(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "id2label"}


LLAMA_405B: dict[str, Any] = without_labels(llama_classifier.LLAMA_8B) | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
}

ROW = Row(
    module="llama",
    architecture="LlamaForCausalLM",
    hf=llama_classifier.TINY,
    variations={"tied": {"tie_word_embeddings": True}},
    published={
        "Llama-3.2-1B": Published(without_labels(llama_classifier.LLAMA_1B), 1_235_814_400),
        "Llama-3.1-8B": Published(without_labels(llama_classifier.LLAMA_8B), 8_030_261_248),
        "Llama-3.1-405B": Published(LLAMA_405B, 405_853_388_800),
    },
    faults={"theta": {"rope_theta": 9000.0}, "eps": {"rms_norm_eps": 1e-3}},
    linears=r"self_attn|mlp",
    vllm="llama:LlamaForCausalLM",
)
