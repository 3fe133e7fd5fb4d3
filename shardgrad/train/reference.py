"""The same decoders on one device, in nothing but torch: what the sharded ones are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal self-attention: x [b, s, d] → [b, s, d]. theta: the base of rotary positions, if any."""

    def __init__(self, d_model: int, heads: int, kv_heads: int, bias: bool, theta: float | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.theta = heads, kv_heads, theta
        width = d_model // heads
        self.query = nn.Linear(d_model, heads * width, bias)
        self.key = nn.Linear(d_model, kv_heads * width, bias)
        self.value = nn.Linear(d_model, kv_heads * width, bias)
        self.output = nn.Linear(d_model, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (heads, -1)).transpose(1, 2) for linear, heads in self._products())
        if self.theta is not None:
            q, k = rotated(q, self.theta), rotated(k, self.theta)
        k, v = (heads.repeat_interleave(self.heads // self.kv_heads, dim=1) for heads in (k, v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(heads.transpose(1, 2).flatten(2))

    def _products(self) -> list[tuple[nn.Linear, int]]:
        return [(self.query, self.heads), (self.key, self.kv_heads), (self.value, self.kv_heads)]


def rotated(x: Tensor, theta: float) -> Tensor:
    """x [b, h, s, k] by complex numbers: features j and j + k/2 are one, turned by position · theta^(-2j/k)."""
    half, wide = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    frequencies = theta ** (-torch.arange(half, device=x.device).to(wide) / half)
    angles = torch.arange(x.shape[-2], device=x.device).to(wide).unsqueeze(-1) * frequencies
    turned = torch.complex(x[..., :half].to(wide), x[..., half:].to(wide)) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


class MLP(nn.Module):
    """x [b, s, d] → [b, s, d] through hidden features: GELU, or SwiGLU where there is a gate."""

    def __init__(self, d_model: int, hidden: int, bias: bool, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, hidden, bias) if gated else None
        self.up = nn.Linear(d_model, hidden, bias)
        self.down = nn.Linear(hidden, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(x)) * up)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm in the dtype of its parameters, which may be wider than that of x; returns that of x."""
    return norm(x.to(next(norm.parameters()).dtype)).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, attention_norm: nn.Module, attention: Attention, mlp_norm: nn.Module, mlp: MLP) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(normed(self.attention_norm, x))
        return x + self.mlp(normed(self.mlp_norm, x))


def name_here(sharded_name: str) -> str:
    """A parameter's name in `Reference`, from that in a sharded decoder: `query_weight` [h,k,d] is `query.weight`
    [h·k,d], and so on; only dims are joined."""
    owner, _, last = sharded_name.rpartition(".")
    return f"{owner}.{last.replace('_', '.')}"


class Reference(nn.Module):
    """A decoder on one device.

    kind: "gpt" (LayerNorm, learned positions, GELU, biases) or "llama" (RMSNorm, rotary positions, SwiGLU, none). The
    other arguments are those of `shardgrad.train.model.GPT` and `shardgrad.train.llama.Llama`.
    """

    def __init__(
        self,
        kind: str = "gpt",
        *,
        layers: int,
        heads: int,
        d_model: int,
        seq_len: int,
        vocab: int,
        kv_heads: int | None = None,
        d_ff: int,
        tied: bool = False,
        norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        gpt = kind == "gpt"
        groups = heads if kv_heads is None else kv_heads

        def norm() -> nn.Module:
            return nn.LayerNorm(d_model, norm_eps) if gpt else nn.RMSNorm(d_model, norm_eps)

        def block() -> Block:
            attention = Attention(d_model, heads, groups, gpt, None if gpt else rope_theta)
            return Block(norm(), attention, norm(), MLP(d_model, d_ff, gpt, not gpt))

        self.embedding = nn.Embedding(vocab, d_model)
        self.positions = nn.Embedding(seq_len, d_model) if gpt else None
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = norm()
        self.head = nn.Linear(d_model, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits: ids [b, s] → [b, s, v]."""
        x = self.embedding(ids)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream is of the products' dtype
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1], device=ids.device)).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(normed(self.norm, x))

    def loss(self, ids: Tensor, targets: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
        """Mean cross-entropy in nats a token; compute_dtype: of products and activations, if not the parameters'."""
        with torch.autocast(ids.device.type, compute_dtype, enabled=compute_dtype is not None):
            logits = self(ids)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide.flatten(0, 1), targets.flatten())

    def parameter_of(self, sharded_name: str) -> nn.Parameter:
        """This model's parameter for the sharded model's; elements stand in the same row-major order."""
        return self.get_parameter(name_here(sharded_name))

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
