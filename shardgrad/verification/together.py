"""What one rank finds wrong, every rank raises: a problem is spread over all axes of a mesh first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.agree import gather_texts
from shardgrad.comm.collectives import gather_ints
from shardgrad.comm.mesh import Axis, MeshView, view
from shardgrad.nn.dtensors import is_dtensor, local, reshard, sharding_places, whole
from shardgrad.nn.sharding import ParamSharding
from shardgrad.nn.shardings import named_shardings
from shardgrad.verification.fingerprint import fingerprint

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
    """A parameter, or a part of a concatenated one, and the axes of a mesh over whose ranks it is held alike."""

    __slots__ = ("_part", "_sharding", "axes", "name", "parameter", "summed")

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        axes: Iterable[Axis],
        left: Iterable[str] = (),
        sharding: ParamSharding | None = None,
        part: int = 0,
    ) -> None:
        self.name, self.parameter = name, parameter
        self.axes = tuple(dict.fromkeys(axis for axis in axes if axis.size > 1))
        self.summed = tuple(axis for axis in self.axes if axis.name not in tuple(left))  # where the gradient is alike
        self._sharding, self._part = sharding, part

    def local(self, x: Tensor) -> Tensor:
        """What this rank has of the part, of the parameter or of a tensor that belongs to it.

        Of a concatenation that is a DTensor, its fingerprint: the DTensor's shards begin elsewhere in it where another
        part has another size, so that they are gathered, and only the gathered are alike.
        """
        sharding = self._sharding
        if sharding is None or not sharding.parts or x.shape != self.parameter.shape:  # the state may be one number
            return local(x)
        part = sharding.pieces(whole(x))[self._part][0]
        return fingerprint(part) if is_dtensor(x) else part


def held(model: nn.Module, mesh: DeviceMesh | None) -> tuple[list[Held], list[MeshView]]:
    """Every parameter with the axes that replicate it, and the meshes: of shardgrad's layers by their storage, of
    DTensors by their placements, and of plain parameters all axes of `mesh`, where it is given; less the axes over
    which a DTensor is in shards. Of a concatenation, each part.

    Raises:
        TypeError, ShapeError, LayoutError: as `named_shardings`.
        ValueError: nothing says how any parameter is held.
    """
    meshes: dict[int, MeshView] = {} if mesh is None else {id(mesh): view(mesh)}
    reshard(model)
    found: list[Held] = []
    for name, parameter, sharding in named_shardings(model):
        replicated, sharded = [], []
        if is_dtensor(parameter):
            dtensor: Any = parameter
            place = meshes.setdefault(id(dtensor.device_mesh), view(dtensor.device_mesh))
            replicated = [a for a, p in zip(place.axes.values(), dtensor.placements) if p.is_replicate()]
            sharded = [axis for _, axis in sharding_places(parameter)]
        for at, leaf in enumerate((None,) if sharding is None else sharding.leaves):
            axes, left = list(replicated), tuple[str, ...]()
            if leaf is not None:
                place, left = meshes.setdefault(id(leaf.mesh), view(leaf.mesh)), leaf.spec.grad_partial
                axes += [axis for axis in place.axes.values() if axis.name not in leaf.spec.axes]
            elif mesh is not None:
                axes += view(mesh).axes.values()
            elif not is_dtensor(parameter):
                continue
            axes = [axis for axis in axes if not any(len({*axis.ranks} & {*one.ranks}) > 1 for one in sharded)]
            part = f"{name}, part {at}" if sharding is not None and sharding.parts else name
            found.append(Held(part, parameter, axes, left, sharding, at))
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
