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

from shardgrad.comm.first_derivatives import FirstDerivativeOnly
from shardgrad.comm.mesh import MeshView, view
from shardgrad.comm.pieces import KEY, exact
from shardgrad.errors import LayoutError
from shardgrad.layout.tree import TreeSum
from shardgrad.ops import modes

Key = frozenset[int]
"""Which parameters, by their identity."""

_KEY = "micro-batches"
_UNLIKE = (
    "exact mode: a parameter is not used alike in all micro-batches of sg.micro_batches: gradients of it are missing"
)


@dataclass
class _Accumulating:
    """axis, count: of whose pieces a step has so many micro-batches. at: the one now.

    sums: of each parameter, or set of them, one for each of its uses. used: how many of these the backward of this
    micro-batch has come to. operands: of the product whose backward is now, by the place of their gradients.
    """

    axis: str
    count: int
    at: int = 0
    sums: dict[Key, list[TreeSum[Tensor]]] = field(default_factory=dict)
    used: dict[Key, int] = field(default_factory=dict)
    operands: dict[int, Key] = field(default_factory=dict)

    def push(self, key: Key, gradient: Tensor) -> Tensor | None:
        """The gradient of the next use of a parameter; the sum of all micro-batches, with the last of them."""
        sums, use = self.sums.setdefault(key, []), self.used.get(key, 0)
        self.used[key] = use + 1
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
    now = _Accumulating(axis, count)
    _switch(mesh_view, {**pieces, axis: each}, now)
    modes.accumulating.append(now)
    try:
        for at in range(count):
            now.at = at
            now.used.clear()
            yield at
    finally:
        modes.accumulating.remove(now)
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


def is_last(mesh_view: MeshView) -> bool:
    """Whether this is the last micro-batch, after which what has been held goes on; also outside of any."""
    now: _Accumulating | None = mesh_view.settings.get(_KEY)
    return now is None or now.at == now.count - 1


def held(mesh_view: MeshView, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Parameters, each as one use of it outside of products: micro-batches' gradients of it are added in the tree."""
    now: _Accumulating | None = mesh_view.settings.get(_KEY)
    if now is None or not torch.is_grad_enabled():
        return parameters
    return [_Use.apply(now, one) if one.requires_grad else one for one in parameters]


class _Use(FirstDerivativeOnly):
    what = "sg.micro_batches"

    @staticmethod
    def forward(ctx: Any, now: _Accumulating, parameter: Tensor) -> Tensor:
        ctx.now = now
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        return None, ctx.now.push(_leaves(ctx.next_functions[0][0]), gradient)


def holding(mesh_view: MeshView, node: Any, other: bool) -> _Accumulating | None:
    """The step whose micro-batches a product's gradients belong to, told which operands they are of.

    node: of the graph. other: whether gradients go another way.

    Raises:
        LayoutError: they do: they are deferred, or added to a main_grad.
    """
    now: _Accumulating | None = mesh_view.settings.get(_KEY)
    if now is None:
        return None
    if other:
        raise LayoutError(
            "exact mode: sg.micro_batches adds gradients itself: do without sg.defer_weight_grads and sg.use_main_grads"
        )
    now.operands = {at: _leaves(entry[0]) for at, entry in enumerate(node.next_functions) if at}
    return now


def hold(
    gradient: Tensor, view: MeshView, at: int, wide: torch.dtype | None, dtype: torch.dtype | None
) -> Tensor | None:
    """What `Hold` does with the gradient of an operand."""
    now: _Accumulating = view.settings[_KEY]
    whole = now.push(now.operands[at], gradient if wide is None else gradient.to(wide))
    return whole if whole is None or dtype is None else whole.to(dtype)


def _leaves(node: Any) -> Key:
    """The parameters that a node of the graph comes from: the same in every micro-batch."""
    found, ahead = set[int](), [node]
    while ahead:
        one = ahead.pop()
        if one is not None and hasattr(one, "variable"):
            found.add(id(one.variable))
        elif one is not None:
            ahead += [before for before, _ in one.next_functions]
    return frozenset(found)
