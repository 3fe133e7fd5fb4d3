"""What autograd Functions of shardgrad do where torch asks for more than a first backward: right, or an error.

Backwards that have no derivative themselves raise when one is asked for, and never give zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from shardgrad.comm import shim

Backward = Callable[..., Any]
F = TypeVar("F", bound=type[torch.autograd.Function])


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


class FirstDerivativeOnly(torch.autograd.Function):
    """An autograd Function that has a backward and nothing more: all else raises, with the name of what it is of.

    class _Cut(FirstDerivativeOnly):
        what = "a tensor cut into pieces"
    """

    what: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.backward = staticmethod(first_derivative_only(cls.what)(cls.backward))  # type: ignore[method-assign]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        refuse_transforms(cls.what)
        return super().apply(*args)


def refuse_transforms(what: str) -> None:
    """Raise inside torch.func's transforms and forward-mode differentiation: `what` has a backward only.

    Raises:
        RuntimeError: inside one of them.
    """
    if shim.beyond_backward():
        raise RuntimeError(
            f"{what} was reached inside torch.func (grad, vmap, jvp, ...) or forward-mode differentiation, where "
            "shardgrad cannot follow it: call it outside of them, and use backward() or torch.autograd.grad"
        )


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, what: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.what = what
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"a second derivative through {ctx.what} was asked for: shardgrad's backward is once_differentiable. Leave "
            "it out of what is differentiated twice, or compute that part with torch's own on one device"
        )


def entry_by_entry(function: F) -> F:
    """Decorate an autograd Function of tensors that communicates: under `torch.vmap` it runs once for each entry, in
    order, so that ranks with as many entries make the same calls."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        made = [
            function.apply(*[arg if dim is None else arg.select(dim, at) for arg, dim in zip(args, in_dims)])
            for at in range(info.batch_size)
        ]
        if isinstance(made[0], Tensor):
            return torch.stack(made), 0
        return tuple([torch.stack(each) for each in zip(*made)]), (0,) * len(made[0])

    function.vmap = staticmethod(vmap)  # type: ignore[method-assign]
    return function
