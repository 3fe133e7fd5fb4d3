"""Text from the sharded model, one byte after the other; every rank takes part and gets all of it."""

from __future__ import annotations

import torch

from shardgrad.comm.adjoint import gather_replicated
from shardgrad.train.model import GPT


@torch.no_grad()
def generate(model: GPT, prompt: bytes, count: int, *, temperature: float, seed: int) -> bytes:
    """The prompt and `count` bytes drawn after it.

    Each byte is drawn from the softmax of the last position's logits divided by `temperature`, gathered on every rank;
    with the same seed every rank draws the same. The model sees at most its last `seq_len` bytes, and always a whole
    window of them, filled up behind, where a causal model does not look: so all steps have one shape.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    text = list(prompt)
    for _ in range(count):
        seen = text[-model.seq_len :]
        window = torch.tensor([seen + [0] * (model.seq_len - len(seen))], device=device)
        local = model(window)[:, len(seen) - 1]
        logits = gather_replicated(local, model.mesh, model.axis, dim=1, size=model.vocab)[0]
        likely = torch.softmax(logits.double().cpu() / temperature, dim=0)
        text.append(int(torch.multinomial(likely, 1, generator=generator)))
    return bytes(text)
