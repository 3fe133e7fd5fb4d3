"""The same GPT on one device, in nothing but torch: what the sharded one is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal multi-head self-attention: x [b, s, d] → [b, s, d]."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(heads.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """x [b, s, d] → [b, s, d] through 4 d hidden features."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, heads)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class ReferenceGPT(nn.Module):
    """`shardgrad.train.model.GPT` on one device; arguments as there."""

    def __init__(self, *, layers: int, heads: int, d_model: int, seq_len: int, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        self.positions = nn.Embedding(seq_len, d_model)
        self.blocks = nn.ModuleList(Block(d_model, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits: ids [b, s] → [b, s, v]."""
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token."""
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())

    def parameter_of(self, sharded_name: str) -> nn.Parameter:
        """This model's parameter for the sharded model's `query_weight` [h,k,d]: `query.weight` [h·k,d], and so on.

        Elements stand in the same row-major order; only dims are joined.
        """
        owner, _, last = sharded_name.rpartition(".")
        return self.get_parameter(f"{owner}.{last.replace('_', '.')}")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy global tensors, by the sharded model's names; every parameter must be among them, and no other.

        Raises:
            ValueError: a parameter is missing, unknown, or of another number of elements.
        """
        targets = {name: self.parameter_of(name) for name in tensors}
        missing = [name for name, own in self.named_parameters() if all(own is not t for t in targets.values())]
        if missing:
            raise ValueError(f"no tensors for {', '.join(missing)}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                if tensor.numel() != targets[name].numel():
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(targets[name].shape)}")
                targets[name].copy_(tensor.reshape(targets[name].shape))
