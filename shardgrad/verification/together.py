"""What one rank finds wrong, every rank raises: a problem is spread over all axes of a mesh first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.agree import gather_texts
from shardgrad.comm.collectives import gather_ints
from shardgrad.comm.mesh import Axis, MeshView, view
from shardgrad.nn.shardings import named_shardings

_END = "\0"


def spread(problems: Iterable[str], mesh_view: MeshView, what: str) -> list[str]:
    """The problems of all ranks of the mesh, alike on each, without duplicates: one small exchange an axis, and a
    second where there are any."""
    found = list(dict.fromkeys(problems))
    for axis in mesh_view.axes.values():
        if axis.size == 1:
            continue
        if any(row[0] for row in gather_ints([len(found)], axis, mesh_view.device, what)):
            texts = gather_texts(_END.join(found), axis, mesh_view.device)
            found = list(dict.fromkeys(text for said in texts for text in said.split(_END) if text))
    return found


class Held:
    """A parameter, and the axes of a mesh over whose ranks it is held alike."""

    __slots__ = ("axes", "name", "parameter", "summed")

    def __init__(self, name: str, parameter: nn.Parameter, axes: Iterable[Axis], left: Iterable[str] = ()) -> None:
        self.name, self.parameter = name, parameter
        self.axes = tuple(axis for axis in axes if axis.size > 1)
        self.summed = tuple(axis for axis in self.axes if axis.name not in tuple(left))  # where the gradient is alike


def held(model: nn.Module, mesh: DeviceMesh | None) -> tuple[list[Held], list[MeshView]]:
    """Every parameter with the axes that replicate it, and the meshes: of shardgrad's layers by their storage, of
    DTensors by their placements, of plain parameters all axes of `mesh`, and none if it is not given.

    Raises:
        TypeError, ShapeError, LayoutError: as `named_shardings`.
        ValueError: nothing says how any parameter is held.
    """
    meshes: dict[int, MeshView] = {} if mesh is None else {id(mesh): view(mesh)}
    found = []
    dtensors = any(hasattr(parameter, "to_local") for parameter in model.parameters())
    entries = [(n, p, None) for n, p in model.named_parameters()] if dtensors else named_shardings(model)
    for name, parameter, sharding in entries:
        if hasattr(parameter, "to_local"):
            dtensor: Any = parameter
            place = meshes.setdefault(id(dtensor.device_mesh), view(dtensor.device_mesh))
            axes = [a for a, p in zip(place.axes.values(), dtensor.placements) if p.is_replicate()]
            found.append(Held(name, parameter, axes))
        elif sharding is not None:
            place = meshes.setdefault(id(sharding.mesh), view(sharding.mesh))
            axes = [axis for axis in place.axes.values() if axis.name not in sharding.spec.axes]
            found.append(Held(name, parameter, axes, sharding.spec.grad_partial))
        elif mesh is not None:
            found.append(Held(name, parameter, view(mesh).axes.values()))
    if not meshes:
        raise ValueError(
            "no parameter of the model says how it is held: shardgrad's layers and DTensors do; for plain parameters "
            "pass mesh=…, whose ranks all hold them alike"
        )
    return found, list(meshes.values())


def gradient(parameter: nn.Parameter) -> Tensor | None:
    """`.grad`, or the `main_grad` that `use_main_grads` has it summed into instead."""
    found = parameter.grad
    return getattr(parameter, "main_grad", None) if found is None else found
