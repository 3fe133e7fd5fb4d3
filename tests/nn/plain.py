"""A shardgrad layer beside its torch counterpart: parameters moved over, gradients brought together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import shardgrad as sg


def whole(tensor: Tensor, sharding: sg.ParamSharding | None) -> Tensor:
    """A parameter, or its gradient, as one device holds it."""
    return tensor.detach() if sharding is None else sharding.unshard(tensor)


def load_from(plain: nn.Module, sharded: nn.Module) -> nn.Module:
    """`plain` with the global values of `sharded`'s parameters."""
    plain.load_state_dict({name: whole(p, sharding) for name, p, sharding in sg.named_shardings(sharded)})
    return plain


def assert_gradients_match(sharded: nn.Module, plain: nn.Module, rtol: float = 1e-11) -> None:
    """Every parameter's gradient, whole, against one device's, norm by norm in float64 (NaN fails)."""
    expected = dict(plain.named_parameters())
    for name, parameter, sharding in sg.named_shardings(sharded):
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        found, right = whole(parameter.grad, sharding), expected[name].grad
        assert right is not None, name
        torch.testing.assert_close(
            found, right, rtol=rtol, atol=rtol * float(right.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )


def randn(*shape: int, seed: int) -> Tensor:
    """Normal float64 numbers, alike on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
