"""Mistral as an embedding model."""

from tests.models.rows import mistral
from tests.models.zoo import Published, Row

HF = {**mistral.HF, "pooling": "last", "normalize": True}
# Source: made from Mistral-7B-v0.1, without the logits' table; of another size none is known.
READ = {"pooling": "last", "normalize": True}  # from modules.json
E5 = mistral.PUBLISHED["Mistral-7B-v0.1"].config

ROW = Row(
    module="mistral_embedding",
    architecture="MistralModel",
    hf=HF,
    variations={"mean": {"pooling": "mean"}, "no-window": {"sliding_window": None}},
    published={"e5-mistral-7b-instruct": Published({**E5, **READ}, 7_241_732_096 - 32000 * 4096)},
    faults={"theta": {"rope_theta": 9000.0}, "window": {"sliding_window": 25}},
    served=("mean",),
    vllm="mistral:MistralForCausalLM",
    layer="",
    linears=r"self_attn|mlp",
)
