"""Plain generation with the pure function: no cache, no engine. For debugging, and as an oracle."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from funcmodels import tree
from funcmodels.init import seed_of
from funcmodels.pooling import check_task
from funcmodels.prompts import Prompts, prompts
from funcmodels.spec import Model


@torch.no_grad()
def generate(
    model: Model,
    weights: Any,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    eos: int | Collection[int] | None = None,
) -> Any:
    """Continue prompts, running the whole sequence through `model.forward` for every token.

    Args:
        tokens: a prompt (seq,), or several: (batch, seq), or a list of lists of any lengths.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together reach this probability.
        top_k: sample among this many of the likeliest tokens; 0 for all.
        seed: of the sampling, which for a prompt depends on its place and on nothing beside it.
            None draws one.
        eos: tokens that end a sequence; the one that did is its last.
    Returns:
        The new tokens, without the prompt: a list for one prompt, a list of lists for several.
    Raises:
        ShapeError: an empty prompt.
        TaskError: the model makes embeddings or classes.
    """
    check_task(model, "generate")
    rows, is_single = prompts(tokens)
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    seed = torch.seed() if seed is None else seed
    generators = [torch.Generator().manual_seed(seed_of(seed, str(i))) for i in range(len(rows))]
    new: list[list[int]] = [[] for _ in rows]
    going = list(range(len(rows)))
    for _ in range(max_new_tokens):
        logits = _last_logits(model, weights, [rows[i] + new[i] for i in going])
        for i, row in zip(going, logits, strict=True):
            new[i].append(_sample(row, temperature, top_p, top_k, generators[i]))
        going = [i for i in going if new[i][-1] not in ends]
        if not going:
            break
    return new[0] if is_single else new


@torch.no_grad()
def logprobs(model: Model, weights: Any, tokens: Prompts) -> Any:
    """Log-probability of each token but the first, given those before it.

    log_softmax of the logits in float32, as engines report for `prompt_logprobs`.

    Args:
        tokens: as for `generate`.
    Returns:
        (seq - 1,) float32 on the CPU for one prompt, a list of them for several.
    Raises:
        ShapeError: an empty prompt.
        TaskError: the model makes embeddings or classes.
    """
    check_task(model, "generate")
    rows, is_single = prompts(tokens)
    out = []
    for row, logits in zip(rows, _logits(model, weights, rows), strict=True):
        chosen = torch.tensor(row[1:], dtype=torch.long, device=logits.device)[:, None]
        each = logits[: len(row) - 1].float().log_softmax(-1)  # (seq - 1, vocab)
        out.append(each.gather(-1, chosen)[:, 0].cpu())
    return out[0] if is_single else out


def _logits(model: Model, weights: Any, rows: list[list[int]]) -> Tensor:
    """Logits (batch, longest, vocab) of rows padded at their ends.

    The padding comes after every real token, where causal attention does not look; its positions
    repeat the last real one, so that no rotary scaling sees a longer sequence.
    """
    device = _device(weights)
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    last = torch.tensor([len(row) - 1 for row in rows], device=device)[:, None]
    positions = torch.arange(longest, device=device).minimum(last)
    return model.forward(weights, tokens, positions)


def _last_logits(model: Model, weights: Any, rows: list[list[int]]) -> Tensor:
    """Float32 logits (batch, vocab) after the last token of each row, on the CPU."""
    last = torch.tensor([len(row) - 1 for row in rows])
    logits = _logits(model, weights, rows)
    return logits[torch.arange(len(rows)), last.to(logits.device)].float().cpu()


def _sample(
    logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator
) -> int:
    """One token from the logits (vocab,)."""
    if temperature == 0:
        return int(logits.argmax())
    values, order = (logits / temperature).sort(descending=True)
    if top_k:
        values, order = values[:top_k], order[:top_k]
    probs = values.softmax(-1)
    # A token stays while those before it have not yet reached top_p: the first always does.
    probs = probs * ((probs.cumsum(-1) - probs) < top_p)
    return int(order[torch.multinomial(probs, 1, generator=generator)])


def _device(weights: Any) -> torch.device:
    return tree.leaves(weights)[0].device
