"""Qwen3 as a classifier of sequences."""

from tests.models.rows import qwen3
from tests.models.zoo import Published, Row

HF = {**qwen3.HF, "pad_token_id": 0, "num_labels": 5}

# Source: none was found; by their numbers of parameters alone.
ROW = Row(
    module="qwen3_classifier",
    architecture="Qwen3ForSequenceClassification",
    hf=HF,
    variations={
        "one label": {"num_labels": 1},
        "regression": {"num_labels": 1, "problem_type": "regression"},
        "tied": {"tie_word_embeddings": True},
        "window": qwen3.WINDOW,
    },
    published={
        "Skywork-Reward-V2-Qwen3-0.6B": Published(
            {**qwen3.PUBLISHED["Qwen3-0.6B"].config, "id2label": {"0": "LABEL_0"}},
            596_049_920 + 1024,
        ),
        "Skywork-Reward-V2-Qwen3-8B": Published(
            {**qwen3.PUBLISHED["Qwen3-8B"].config, "id2label": {"0": "LABEL_0"}},
            8_190_735_360 - 151936 * 4096 + 4096,  # a score in the place of the logits
        ),
    },
    faults={"theta": {"rope_theta": 900000.0}, "eps": {"rms_norm_eps": 1e-3}},
    served=("one label", "regression"),
    vllm="qwen3:Qwen3ForCausalLM",
    layer="",
    linears=r"self_attn|mlp",
)
