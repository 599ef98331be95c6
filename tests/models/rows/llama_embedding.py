"""Llama as an embedding model."""

from tests.models.rows.llama_classifier import LLAMA_1B, LLAMA_8B, TINY
from tests.models.zoo import Published, Row

HF = {**TINY, "pooling": "mean", "normalize": True}
READ = {"pooling": "mean", "normalize": True}  # from modules.json

ROW = Row(
    module="llama_embedding",
    architecture="LlamaModel",
    hf=HF,
    variations={"last": {"pooling": "last"}, "bias": {"attention_bias": True, "mlp_bias": True}},
    published={  # Llama's own, without the logits' table where it is not the tokens'
        "Llama-3.1-8B": Published({**LLAMA_8B, **READ}, 8_030_261_248 - 128256 * 4096),
        "Llama-3.2-1B": Published({**LLAMA_1B, **READ}, 1_235_814_400),
    },
    faults={"theta": {"rope_theta": 9000.0}, "eps": {"rms_norm_eps": 1e-3}},
    served=("last",),
    vllm="llama:LlamaForCausalLM",
    layer="",
    linears=r"self_attn|mlp",
)
