"""Backwards that have no derivative themselves: asked for a second derivative, they raise, and never give zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., Any]


def first_derivative_only(what: str) -> Callable[[Backward], Backward]:
    """Decorate the backward of an autograd Function: under `create_graph=True` its gradients depend, in autograd's
    graph, on all that they were computed from, so that whoever differentiates them arrives at an error.

    torch's `once_differentiable` ties them to nothing: `torch.autograd.functional.hessian` and `hvp` then take the
    inputs for constants, and return zeros.

    what: of which there is no second derivative, for the message.
    """

    def decorate(backward: Backward) -> Backward:
        def once(ctx: Any, *dys: Tensor | None) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *dys)
            with torch.no_grad():
                grads = backward(ctx, *dys)
            sources = [t for t in (*dys, *ctx.saved_tensors) if isinstance(t, Tensor) and t.requires_grad]
            tied = [_Tied.apply(what, one, *sources) if isinstance(one, Tensor) else one for one in _several(grads)]
            return tuple(tied) if isinstance(grads, tuple) else tied[0]

        return once

    return decorate


def _several(grads: Any) -> tuple[Any, ...]:
    return grads if isinstance(grads, tuple) else (grads,)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, what: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.what = what
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"a second derivative through {ctx.what} was asked for: shardgrad's backward is once_differentiable. Leave "
            "sharded products out of what is differentiated twice, or compute that part with torch's own on one device"
        )
