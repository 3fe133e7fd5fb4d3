"""Optimizers of torch's whose step depends on how a parameter is sharded, refused while exact mode is set on a mesh.

Measured of all in torch.optim (torch 2.13, one thread), on parts of a tensor of any number of elements beside the
whole: Adam, AdamW and most others make equal bits. SGD and ASGD round the last elements of a 16-bit parameter
otherwise; others sum over a parameter's rows, or over all of it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardgrad.comm.mesh import MeshView
from shardgrad.comm.pieces import exact
from shardgrad.errors import LayoutError

_SUMMING = (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon)
_IN_16_BITS = (torch.optim.SGD, torch.optim.ASGD)
_set: dict[str, weakref.ref[MeshView]] = {}  # by handle
_hooks: list[object] = []  # one, once a mesh has been exact


def watch_optimizers(mesh_view: MeshView) -> None:
    """Look at each optimizer's step from now on, as long as exact mode is set on the mesh."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_check))
    _set[mesh_view.handle] = weakref.ref(mesh_view)


def _check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    views = [found for one in _set.values() if (found := one()) is not None]
    if not any(exact(mesh_view) is not None for mesh_view in views):
        return
    name = type(optimizer).__name__
    if isinstance(optimizer, _SUMMING):
        raise LayoutError(
            f"exact mode: {name} sums over a parameter, of which a rank has a part: take one that treats each element "
            "by itself, such as AdamW"
        )
    narrow = isinstance(optimizer, _IN_16_BITS) and any(
        parameter.is_floating_point() and parameter.element_size() < 4
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    if narrow:
        raise LayoutError(
            f"exact mode: {name} rounds the last elements of a 16-bit parameter otherwise than the rest, and which are "
            "the last depends on the ranks: keep parameters in float32, with torch.autocast, or take AdamW"
        )
