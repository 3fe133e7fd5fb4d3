"""Tokens from the sharded model, one after the other; every rank takes part and gets all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardgrad.train.language_model import LanguageModel, evaluating


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: Sequence[int], count: int, *, temperature: float, seed: int, top_k: int | None = None
) -> list[int]:
    """The prompt and `count` ids drawn after it.

    Each id is drawn by `choose` from the last position's logits, gathered on every rank; with the same seed every rank
    draws the same. The model sees at most its last `seq_len` tokens, and always a whole window of them, filled up
    behind, where a causal model does not look: so all steps have one shape.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    ids = list(prompt)
    with evaluating(model):
        for _ in range(count):
            seen = ids[-model.seq_len :]
            window = torch.tensor([seen + [0] * (model.seq_len - len(seen))], device=device)
            ids.append(choose(model.next_logits(window, len(seen) - 1), temperature, top_k, generator))
    return ids


def choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One id from logits [v]: the likeliest at temperature 0 (of several, the first), else drawn from the softmax of
    logits / temperature over the `top_k` likeliest, or over all."""
    exact = logits.double().cpu()
    if temperature == 0:
        return int(exact.argmax())
    if top_k is not None and top_k < len(exact):
        kept = exact.sort(descending=True, stable=True).indices[:top_k]
        exact = torch.full_like(exact, -torch.inf).index_copy(0, kept, exact[kept])
    likely = torch.softmax((exact - exact.max()) / temperature, dim=0)  # at 1e-300 the largest stays finite
    return int(torch.multinomial(likely, 1, generator=generator))
