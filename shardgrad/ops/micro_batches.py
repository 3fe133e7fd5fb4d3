"""Gradient accumulation in exact mode: micro-batches are pieces of the batch, added in the tree like any others.

Autograd adds what one micro-batch after the other brings, from the left, and the uses of one parameter before that.
Here each use keeps its gradients of the micro-batches as a `TreeSum`, and hands on the sum with the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.mesh import MeshView, view
from shardgrad.comm.pieces import KEY, exact
from shardgrad.errors import LayoutError
from shardgrad.layout.tree import TreeSum

_KEY = "micro-batches"
_UNLIKE = (
    "exact mode: a parameter is not used alike in all micro-batches of sg.micro_batches: gradients of it are missing"
)


@dataclass
class _Accumulating:
    """count: micro-batches of a step. at: the one now. sums: of each parameter, one for each of its uses.
    used: how many of these the backward of this micro-batch has come to."""

    count: int
    at: int = 0
    sums: dict[int, list[TreeSum[Tensor]]] = field(default_factory=dict)
    used: dict[int, int] = field(default_factory=dict)

    def push(self, parameter: int, gradient: Tensor) -> Tensor | None:
        """The gradient of the next use of a parameter; the sum of all micro-batches, with the last of them."""
        sums, use = self.sums.setdefault(parameter, []), self.used.get(parameter, 0)
        self.used[parameter] = use + 1
        if use == len(sums):
            sums.append(TreeSum(self.count, torch.add))
        sums[use].push((self.at, self.at + 1), gradient)
        if self.at < self.count - 1:
            return None
        if not sums[use].is_whole:
            raise LayoutError(_UNLIKE)
        return sums[use].values[0]


def micro_batches(mesh: DeviceMesh, count: int, axis: str = "dp") -> Iterator[int]:
    """The numbers of a step's micro-batches; in exact mode, gradients are those of one batch on more ranks, to the bit.

        for at in sg.micro_batches(mesh, 4):
            (model_loss(batch.chunk(4)[at]) / tokens).backward()

    Micro-batches × ranks are then what ranks alone are elsewhere: each is as many of the axis's pieces. They are
    consecutive parts of the batch, each of them sharded over the axis. After the last, `.grad` has the sum; before, it
    has nothing. Each use of a parameter holds at most log2(count) + 1 gradients. Without exact mode nothing is changed.

    Args:
        mesh, count, axis: the axis whose pieces they are.

    Raises:
        LayoutError: micro-batches and ranks do not divide the axis's pieces, or the pieces of one are no node of the
            tree; a backward left out a use of a parameter that another micro-batch has.
    """
    mesh_view = view(mesh)
    pieces = exact(mesh_view)
    if pieces is None or count == 1:
        yield from range(count)
        return
    mesh_view.axis(axis, "micro_batches")
    each = pieces[axis] // count
    if pieces[axis] % (count * mesh_view.shape[axis]) or each & (each - 1):
        raise LayoutError(
            f"exact mode: {count} micro-batches on {mesh_view.shape[axis]} ranks of axis {axis!r} are to be parts of "
            f"its {pieces[axis]} pieces: of as many each, a power of two"
        )
    now = _Accumulating(count)
    _switch(mesh_view, {**pieces, axis: each}, now)
    try:
        for at in range(count):
            now.at = at
            now.used.clear()
            yield at
    finally:
        _switch(mesh_view, pieces, None)
    if any(not one.is_whole for sums in now.sums.values() for one in sums):
        raise LayoutError(_UNLIKE)


def _switch(mesh_view: MeshView, pieces: Any, now: _Accumulating | None) -> None:
    mesh_view.settings[KEY] = pieces
    mesh_view.settings.pop(_KEY, None)
    if now is not None:
        mesh_view.settings[_KEY] = now
    for bound in mesh_view.bound.values():
        bound.use_settings()


def held(mesh_view: MeshView, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Parameters, each as one use of it: of which micro-batches' gradients are added in the tree.

    Raises:
        LayoutError: one that is trained is no parameter, and is not made of held ones.
    """
    now: _Accumulating | None = mesh_view.settings.get(_KEY)
    if now is None or not torch.is_grad_enabled():
        return parameters
    return [_held(now, parameter) for parameter in parameters]


def _held(now: _Accumulating, parameter: Tensor) -> Tensor:
    if not parameter.requires_grad or (not parameter.is_leaf and _is_held(parameter)):
        return parameter  # held once: what is summed behind its use, each micro-batch sums for itself
    leaf = parameter if parameter.is_leaf else parameter._base
    if leaf is None or not leaf.is_leaf:
        raise LayoutError(
            f"exact mode: a weight of shape {tuple(parameter.shape)} is computed from other tensors, whose gradients "
            "micro-batches would add in another order: pass a parameter, or do without sg.micro_batches"
        )
    made: Tensor = _Use.apply(now, id(leaf), parameter)
    return made


def _is_held(parameter: Tensor) -> bool:
    """Whether a tensor is made of uses of parameters alone."""
    ahead = [parameter.grad_fn]
    while ahead:
        node = ahead.pop()
        if getattr(node, "_forward_cls", None) is _Use:
            continue
        before = [one for one, _ in node.next_functions if one is not None] if node is not None else []
        if not before:
            return False
        ahead += before
    return True


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, now: _Accumulating, key: int, parameter: Tensor) -> Tensor:
        ctx.now, ctx.key = now, key
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor | None]:
        return None, None, ctx.now.push(ctx.key, gradient)
