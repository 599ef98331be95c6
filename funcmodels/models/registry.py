"""Which zoo file reads which Hugging Face architecture."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from pathlib import Path

from funcmodels.atomic import recover
from funcmodels.errors import ConfigError, listed
from funcmodels.models.sentence import pooling_of
from funcmodels.spec import Model

# A name of config.json's `architectures` -> the module whose Config and model() read it.
ZOO = {
    "FmLlamaForCausalLM": "funcmodels.models.llama",
    "LlamaForCausalLM": "funcmodels.models.llama",
    "FmLlamaForSequenceClassification": "funcmodels.models.llama_classifier",
    "LlamaForSequenceClassification": "funcmodels.models.llama_classifier",
    "FmLlamaModel": "funcmodels.models.llama_embedding",
    "LlamaModel": "funcmodels.models.llama_embedding",
    "FmMistralModel": "funcmodels.models.mistral_embedding",
    "MistralModel": "funcmodels.models.mistral_embedding",
    "FmQwen3ForSequenceClassification": "funcmodels.models.qwen3_classifier",
    "Qwen3ForSequenceClassification": "funcmodels.models.qwen3_classifier",
    "FmQwen3Model": "funcmodels.models.qwen3_embedding",
    "Qwen3Model": "funcmodels.models.qwen3_embedding",
    "FmBertModel": "funcmodels.models.bert",
    "BertModel": "funcmodels.models.bert",
    "FmModernBertModel": "funcmodels.models.modernbert",
    "ModernBertModel": "funcmodels.models.modernbert",
    "FmDeepseekV2ForCausalLM": "funcmodels.models.deepseek_v2",
    "DeepseekV2ForCausalLM": "funcmodels.models.deepseek_v2",
    "FmDeepseekV3ForCausalLM": "funcmodels.models.deepseek_v3",
    "DeepseekV3ForCausalLM": "funcmodels.models.deepseek_v3",
    "FmGemma2ForCausalLM": "funcmodels.models.gemma2",
    "Gemma2ForCausalLM": "funcmodels.models.gemma2",
    "FmMistralForCausalLM": "funcmodels.models.mistral",
    "MistralForCausalLM": "funcmodels.models.mistral",
    "FmQwen2ForCausalLM": "funcmodels.models.qwen2",
    "Qwen2ForCausalLM": "funcmodels.models.qwen2",
    "FmGemma3ForCausalLM": "funcmodels.models.gemma3",
    "Gemma3ForCausalLM": "funcmodels.models.gemma3",
    "Gemma3ForConditionalGeneration": "funcmodels.models.gemma3",
    "FmQwen3ForCausalLM": "funcmodels.models.qwen3",
    "FmGlm4MoeForCausalLM": "funcmodels.models.glm4_moe",
    "Glm4MoeForCausalLM": "funcmodels.models.glm4_moe",
    "FmGptOssForCausalLM": "funcmodels.models.gpt_oss",
    "GptOssForCausalLM": "funcmodels.models.gpt_oss",
    "FmMixtralForCausalLM": "funcmodels.models.mixtral",
    "MixtralForCausalLM": "funcmodels.models.mixtral",
    "FmOlmoeForCausalLM": "funcmodels.models.olmoe",
    "OlmoeForCausalLM": "funcmodels.models.olmoe",
    "FmQwen3NextForCausalLM": "funcmodels.models.qwen3_next",
    "Qwen3NextForCausalLM": "funcmodels.models.qwen3_next",
    "FmQwen3MoeForCausalLM": "funcmodels.models.qwen3_moe",
    "Qwen3MoeForCausalLM": "funcmodels.models.qwen3_moe",
    "Qwen3ForCausalLM": "funcmodels.models.qwen3",
    "FmCohereForCausalLM": "funcmodels.models.cohere",
    "CohereForCausalLM": "funcmodels.models.cohere",
    "FmFalconForCausalLM": "funcmodels.models.falcon",
    "FalconForCausalLM": "funcmodels.models.falcon",
    "FmGPT2LMHeadModel": "funcmodels.models.gpt2",
    "GPT2LMHeadModel": "funcmodels.models.gpt2",
    "FmGPTNeoXForCausalLM": "funcmodels.models.gpt_neox",
    "GPTNeoXForCausalLM": "funcmodels.models.gpt_neox",
    "FmGraniteForCausalLM": "funcmodels.models.granite",
    "GraniteForCausalLM": "funcmodels.models.granite",
    "FmGraniteMoeHybridForCausalLM": "funcmodels.models.granite_moe_hybrid",
    "GraniteMoeHybridForCausalLM": "funcmodels.models.granite_moe_hybrid",
    "FmOlmo2ForCausalLM": "funcmodels.models.olmo2",
    "Olmo2ForCausalLM": "funcmodels.models.olmo2",
    "FmLfm2ForCausalLM": "funcmodels.models.lfm2",
    "Lfm2ForCausalLM": "funcmodels.models.lfm2",
    "FmMamba2ForCausalLM": "funcmodels.models.mamba2",
    "Mamba2ForCausalLM": "funcmodels.models.mamba2",
    "FmPhi3ForCausalLM": "funcmodels.models.phi3",
    "Phi3ForCausalLM": "funcmodels.models.phi3",
    "FmSmolLM3ForCausalLM": "funcmodels.models.smollm3",
    "SmolLM3ForCausalLM": "funcmodels.models.smollm3",
    "FmStarcoder2ForCausalLM": "funcmodels.models.starcoder2",
    "Starcoder2ForCausalLM": "funcmodels.models.starcoder2",
}


# What an architecture's name ends with where its encoder or decoder is followed by a head.
_HEAD = re.compile("For(CausalLM|MaskedLM|PreTraining)$")


def load_model(
    folder: str | Path, *, pooling: str | None = None, normalize: bool | None = None
) -> Model:
    """The zoo's model for a checkpoint folder, from its config.json; weights stay on disk.

    Args:
        folder: a Hugging Face folder; `fm.load(model, folder)` then reads its tensors.
        pooling: "mean", "cls" or "last" makes an embedding model of what was published with a head
            for tokens, as ModernBERT or Llama, and passes over the tensors of that head. None takes
            what modules.json and config.json say; so does `normalize`.
    Raises:
        ConfigError: no config.json, an architecture that the zoo lacks, or a config that its file
            does not support.
    """
    folder = Path(folder)
    recover(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"no config.json in {folder}",
            need="a Hugging Face checkpoint folder, as fm.save writes it",
            fix="pass the folder that holds config.json and the .safetensors files",
        )
    asked = {"pooling": pooling, "normalize": normalize}
    asked = pooling_of(folder) | {key: value for key, value in asked.items() if value is not None}
    hf = json.loads(path.read_text()) | asked
    names = hf.get("architectures") or []
    if "pooling" in hf:  # some are published as if they generated text
        names = [_HEAD.sub("Model", name) for name in names]
    module = next((ZOO[name] for name in names if name in ZOO), None)
    if module is None:
        raise _unknown(folder, names)
    zoo = importlib.import_module(module)
    return zoo.model(zoo.Config.from_hf(hf))


def _unknown(folder: Path, names: list[str]) -> ConfigError:
    """The refusal of architectures that the zoo lacks: it may have their encoder, or near ones."""
    got = f"architectures={names}"
    if any(_HEAD.sub("Model", name) in ZOO for name in names):
        return ConfigError(
            f"the zoo has no model with the head of {folder}",
            got=got,
            need="a way to make one vector of a sequence; the head's tensors are passed over then",
            fix=f'fm.load_model("{folder}", pooling="mean"), or "cls", or "last"',
        )
    published = [name for name in ZOO if not name.startswith("Fm")]
    near = difflib.get_close_matches(names[0] if names else "", published, n=3)
    return ConfigError(
        f"no model of the zoo reads {folder}",
        got=got,
        need=f"one of {len(published)} architectures" + (f", as {listed(near)}" if near else ""),
        fix="declare the model and pass it: fm.load(model, folder)",
    )
