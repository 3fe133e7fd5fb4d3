"""Derivatives of products besides the first backward's: second and further ones, forward mode, torch.func's transforms.

A product f is linear in X and in W, and so is its backward g, also in dY. Their derivatives are f and g themselves, of
other operands; u, V, c, e stand for what comes along X, W, B, dY, or for the cotangents of dX, dW, dB:

| function                | along u, V, c, e                         | backward                                        |
| ----------------------- | ---------------------------------------- | ----------------------------------------------- |
| Y = f(X, W) + B         | f(u, W) + f(X, V) + c                    | g(dY, X, W)                                     |
| dX, dW, dB = g(dY, X, W) | g(e, X, W) + g(dY, u, V), this without dB | dY: f(u, W) + f(X, V) + c; X, W: g(dY, u, V)  |

So a collective of theirs is one of f or g, and gradients live where their tensors live, as ever. Under `vmap` a product
runs once for each entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.first_derivatives import entry_by_entry

Executable = Any
"""`ops.executable`'s, which asks this file for its differentiable backward."""
Some = Sequence[Tensor | None]


def product(executable: Executable, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Every Y of the input, the weights and the biases that there are, with all derivatives, in all modes."""
    made: tuple[Tensor, ...] = _Product.apply(executable.needing((True,) * len(tensors)), *tensors)
    return made


def gradients(executable: Executable, dys: Some, operands: Some) -> tuple[Tensor | None, ...]:
    """The gradients that the executable's calls need, differentiably; None for the others.

    dys: zeros are taken for those that are missing. operands: the input and the weights; None for those that no needed
    gradient reads.
    """
    like = next(one for one in (*dys, *operands) if one is not None)
    every = [_zeros(executable, like, "out", at) if dy is None else dy for at, dy in enumerate(dys)]
    made = iter(_Gradients.apply(executable, *every, *operands))
    return tuple([next(made) if need else None for need in executable.needs])


def _zeros(executable: Executable, like: Tensor, role: Any, at: int) -> Tensor:
    p = executable.products
    return like.new_zeros(p.sizes.shape_of(p.plans[at].stored[role]))


def _along(executable: Executable, operands: Some, changes: Some) -> tuple[Tensor, ...]:
    """f(u, W) + f(X, V) + c. changes: u, V and c; None where there is none."""
    p = executable.products
    x, *ws = operands
    u, *vs = changes[: 1 + p.count]
    cs = changes[1 + p.count :]
    like = next(one for one in (*operands, *changes) if one is not None)
    zeros = [_zeros(executable, like, "bias", at) for at in p.biases]
    terms = []
    if u is not None:
        terms.append((u, *ws, *zeros))
    if any(change is not None for change in (*vs, *cs)):
        x = _zeros(executable, like, "lhs", 0) if x is None else x
        vs = [_zeros(executable, like, "rhs", at) if v is None else v for at, v in enumerate(vs)]
        terms.append((x, *vs, *(zero if c is None else c for c, zero in zip(cs, zeros))))
    made = [_call(executable, term) for term in terms]
    return made[0] if len(made) == 1 else tuple([a + b for a, b in zip(*made)])


def _call(executable: Executable, tensors: tuple[Any, ...]) -> tuple[Tensor, ...]:
    with torch.autocast(tensors[0].device.type, enabled=False):
        made = executable.again(tensors)
    return made if isinstance(made, tuple) else (made,)


@shim.untraced
@entry_by_entry
class _Product(torch.autograd.Function):
    @staticmethod
    def forward(executable: Executable, *tensors: Tensor) -> tuple[Tensor, ...]:
        made = executable.needing((False,) * len(tensors)).call(*tensors)
        return made if isinstance(made, tuple) else (made,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.executable, *tensors = inputs
        ctx.save_for_backward(*tensors[: 1 + ctx.executable.products.count])
        ctx.save_for_forward(*tensors[: 1 + ctx.executable.products.count])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gradients(ctx.executable.needing(ctx.needs_input_grad[1:]), dys, ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, *changes: Tensor | None) -> tuple[Tensor, ...]:
        return _along(ctx.executable, ctx.saved_tensors, changes)


@shim.untraced
@entry_by_entry
class _Gradients(torch.autograd.Function):
    """The gradients that are needed, of every dY, the input and the weights."""

    @staticmethod
    def forward(executable: Executable, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        dys, operands = tensors[: executable.products.count], tensors[executable.products.count :]
        saved = [operands[0 if role == "lhs" else 1 + at] for role, at in executable.products.saved(executable.needs)]
        with torch.autocast(next(dy for dy in dys if dy is not None).device.type, enabled=False):
            made = executable.gradients(dys, saved)
        return tuple([one for one in made if one is not None])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.executable, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        executable: Executable = ctx.executable
        count = executable.products.count
        dys, operands = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        of_dys, of_operands = ctx.needs_input_grad[1 : 1 + count], ctx.needs_input_grad[1 + count :]
        every = iter(cotangents)
        changes = [next(every) if need else None for need in executable.needs]
        grads: Some = (None,) * count
        if any(of_dys):
            grads = _along(executable, operands, changes)
        return None, *grads, *_swapped(executable, dys, changes, of_operands)[: 1 + count]

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        executable: Executable = ctx.executable
        count = executable.products.count
        dys, operands, changes = ctx.saved_tensors[:count], ctx.saved_tensors[count:], tangents[count:]
        made = gradients(executable, tangents[:count], operands)
        more = _swapped(executable, dys, changes, executable.needs[: 1 + count])
        both = [a if b is None else a + b for a, b in zip(made, more) if a is not None]
        return tuple(both)


def _swapped(executable: Executable, dys: Some, changes: Some, wanted: Sequence[bool]) -> Some:
    """g(dY, u, V): of the input and of the weights, as far as they are wanted; None for the biases."""
    p = executable.products
    u, *vs = changes[: 1 + p.count]
    of_x = wanted[0] and any(v is not None for v in vs)
    of_ws = [want and u is not None for want in wanted[1 : 1 + p.count]]
    needs = of_x, *of_ws, *(False for _ in p.biases)
    if not any(needs):
        return (None,) * len(needs)
    like = next(dy for dy in dys if dy is not None)
    if of_x:
        vs = [_zeros(executable, like, "rhs", at) if v is None else v for at, v in enumerate(vs)]
    return gradients(executable.needing(needs), dys, (u, *vs))
