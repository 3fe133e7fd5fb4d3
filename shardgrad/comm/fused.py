"""Products that communicate as they multiply: torch's, over symmetric memory. Not differentiable.

The ranks of an axis map one another's memory, and each copies what it needs with its copy engines while the rest is
multiplied: no kernel of a collective takes multiprocessors from the product.
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.agree import gather_texts
from shardgrad.comm.collectives import Collective
from shardgrad.comm.mesh import Axis, MeshView


class FusedGatherMatmul(Collective):
    """Products of matrices with one tensor, gathered along a dim that is not its last.

    returns_whole: whether the gathered tensor is returned too.
    """

    __slots__ = ("_dim", "_name")

    def __init__(self, axis: Axis, dim: int, what: str, *, returns_whole: bool) -> None:
        call = partial(shim.fused_products()[0], return_A=returns_whole)
        super().__init__(axis, what, call, call)
        self._dim, self._name = dim, axis.group.group_name

    def multiply(self, shard: Tensor, rights: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """The whole tensor, or None; and its product with each matrix [inner, columns]."""
        made: tuple[Tensor | None, list[Tensor]] = self._begin(shard, shard, list(rights), self._dim, self._name)
        return made


class FusedMatmulReduceScatter(Collective):
    """A product summed over the ranks, of which each keeps its chunk along a dim of rows."""

    __slots__ = ("_dim", "_name")

    def __init__(self, axis: Axis, dim: int, what: str) -> None:
        call = shim.fused_products()[1]
        super().__init__(axis, what, call, call)
        self._dim, self._name = dim, axis.group.group_name

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """This rank's chunk of the sum of left [rows …, inner] · right [inner, columns]."""
        made: Tensor = self._begin(left, left, right, "sum", self._dim, self._name)
        return made


def lacking(view: MeshView) -> dict[str, str]:
    """For each axis whose ranks cannot do these products together, why. The same on all ranks of the axis, if all of
    them call it."""
    why = shim.lacks_fused_products(view.device)
    axes = [axis for axis in view.axes.values() if axis.size > 1]
    found = {axis.name: why if why else _lack(axis, view.device) for axis in axes}
    return {name: reason for name, reason in found.items() if reason}


def _lack(axis: Axis, device: torch.device) -> str | None:
    """Why the ranks of an axis of CUDA devices cannot map one another's memory."""
    if device.type != "cuda":
        return None
    if shim.is_imagined(axis.group):
        return "the other ranks do not exist (backend fake)"
    told = gather_texts(json.dumps([socket.gethostname(), _uuid(device), device.index]), axis, device)
    places = [json.loads(one) for one in told]
    hosts = dict.fromkeys(place[0] for place in places)
    if len(hosts) > 1:
        return f"its ranks are on {len(hosts)} hosts ({', '.join(hosts)}), and map memory within one"
    shared = [uuid for uuid, count in Counter(place[1] for place in places).items() if count > 1]
    if shared:
        return "several of its ranks share one GPU"
    blocked = [index for _, _, index in places if not _reaches(device.index, index)]
    errors = gather_texts(f"GPU {device.index} cannot reach GPU {blocked[0]}" if blocked else "", axis, device)
    if not any(errors):
        try:
            shim.begin_symmetric_memory(axis.group)
            error = ""
        except RuntimeError as raised:
            error = str(raised).splitlines()[0]
        errors = gather_texts(error, axis, device)
    return next((error for error in errors if error), None)


def _uuid(device: torch.device) -> str:
    properties: Any = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "uuid", device.index))


def _reaches(here: int, there: int) -> bool:
    """Whether one GPU can read another's memory; not known of a GPU that this process does not see."""
    if here == there or there >= torch.cuda.device_count():
        return True
    return bool(torch.cuda.can_device_access_peer(here, there))
