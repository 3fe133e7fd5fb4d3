"""Optimizers of torch's whose step depends on how a parameter is sharded, refused while exact mode is set on a mesh.

Measured of all in torch.optim (torch 2.13, one thread), on parts of a tensor of any number of elements beside the
whole: Adam, AdamW and most others make equal bits. SGD and ASGD round the last elements of a 16-bit parameter
otherwise; others sum over a parameter's rows, or over all of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardgrad.comm.mesh import MeshView
from shardgrad.comm.pieces import exact
from shardgrad.errors import LayoutError

_SUMMING = (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon)
_IN_16_BITS = (torch.optim.SGD, torch.optim.ASGD)
_used: dict[int, tuple[weakref.ref[Tensor], weakref.ref[MeshView]]] = {}  # parameters, by identity, with their meshes
_hooks: list[object] = []  # one, once a mesh has been exact


def watch_optimizers(parameters: Sequence[Tensor], mesh_view: MeshView) -> None:
    """Look at the steps of optimizers that these parameters are given to, while exact mode is set on their mesh."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_check))
    for parameter in parameters:
        if id(parameter) not in _used or _used[id(parameter)][0]() is not parameter:
            _used[id(parameter)] = weakref.ref(parameter), weakref.ref(mesh_view)


def _is_exact(parameter: Tensor) -> bool:
    used, mesh_view = _used.get(id(parameter), (None, None))
    if used is None or mesh_view is None or used() is not parameter:
        return False
    found = mesh_view()
    return found is not None and exact(found) is not None


def _check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not isinstance(optimizer, _SUMMING + _IN_16_BITS):
        return
    parameters = [one for group in optimizer.param_groups for one in group["params"] if _is_exact(one)]
    if not parameters:
        return
    name = type(optimizer).__name__
    if isinstance(optimizer, _SUMMING):
        raise LayoutError(
            f"exact mode: {name} sums over a parameter, of which a rank has a part: take one that treats each element "
            "by itself, such as AdamW"
        )
    if any(parameter.element_size() < 4 for parameter in parameters):
        raise LayoutError(
            f"exact mode: {name} rounds the last elements of a 16-bit parameter otherwise than the rest, and which are "
            "the last depends on the ranks: keep parameters in float32, with torch.autocast, or take AdamW"
        )
