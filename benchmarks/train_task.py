"""What the sides of the training benchmark are told: a model's folder, a batch, a dtype."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HF: dict[str, Any] = {  # SmolLM2-135M
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
QUICK_LAYERS = 4
LR = 1e-4
LENGTH = 512
DOCUMENTS = (200, 120, 100, 60, 32)  # tokens of the documents of each row


@dataclass(frozen=True)
class Task:
    """One benchmark: which side, of which weights, in which dtype, on how many rows.

    Args:
        processor_time: count the processor's seconds, and not those of the clock on the wall.
    """

    side: str
    folder: str
    dtype: str
    rows: int
    processor_time: bool = False

    def text(self) -> str:
        return json.dumps(asdict(self))

    @property
    def tokens(self) -> int:
        return self.rows * LENGTH

    @property
    def hf(self) -> dict[str, Any]:
        return json.loads((Path(self.folder) / "config.json").read_text())

    @property
    def documents(self) -> list[list[int]]:
        """Token ids, of which each row of the batch holds `len(DOCUMENTS)`: the same everywhere."""
        assert sum(DOCUMENTS) == LENGTH
        vocab, seed, found = self.hf["vocab_size"], 1, []
        for size in DOCUMENTS * self.rows:
            ids = []
            for _ in range(size):
                seed = (seed * 1103515245 + 12345) % (1 << 31)
                ids.append((seed >> 8) % vocab)
            found.append(ids)
        return found


def packed(task: Task) -> dict[str, list[list[int]]]:
    """The batch as rows of plain lists, as `fm.pack` lays it out: a side may have no torch."""
    rows: dict[str, list[list[int]]] = {n: [] for n in ("tokens", "positions", "ids", "mask")}
    documents = task.documents
    for start in range(0, len(documents), len(DOCUMENTS)):
        row = documents[start : start + len(DOCUMENTS)]
        rows["tokens"].append([t for d in row for t in d])
        rows["positions"].append([i for d in row for i in range(len(d))])
        rows["ids"].append([n for n, d in enumerate(row) for _ in d])
        rows["mask"].append([int(i < len(d) - 1) for d in row for i in range(len(d))])
    return rows
