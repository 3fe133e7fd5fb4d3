"""What every shardgrad layer is: a module that knows how its parameters, plain local tensors, are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import TellingType
from shardgrad.comm.agree import share_first
from shardgrad.comm.balanced import note_sharded
from shardgrad.comm.mesh import view
from shardgrad.comm.shim import is_fake
from shardgrad.layout.notation import TensorSpec, parse_tensor
from shardgrad.nn.data_parallel import check_replicas_alike
from shardgrad.nn.init import draw_seed
from shardgrad.nn.sharding import ParamSharding

Fill = Callable[[int, Sequence[int], Sequence[int], Sequence[int]], Tensor]


class ShardedModule(nn.Module, metaclass=TellingType):
    """Base of the layers. Subclasses declare parameters with `declare` and give them values with `fill`."""

    def __init__(self, mesh: DeviceMesh, axes: Sequence[str]) -> None:
        super().__init__()
        mesh_view = view(mesh)
        mesh_view.require(axes, type(self).__name__)
        self._axes = tuple(axes)
        self._shardings: dict[str, ParamSharding] = {}
        self._mesh = ParamSharding(TensorSpec("", ()), (), mesh)
        note_sharded(mesh_view, type(self).__name__)
        self._products: dict[Any, Any] = {}  # bound at first use, by whatever key the layer has for them

    def __getstate__(self) -> dict[str, Any]:
        """What copies and torch.save take: not the bound products, which hold process groups and are bound again."""
        return {**self.__dict__, "_products": {}}

    @property
    def mesh(self) -> DeviceMesh:
        return self._mesh.mesh

    def shardings(self) -> dict[str, ParamSharding]:
        """How each parameter of this module itself is stored, by its local name."""
        return dict(self._shardings)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """nn.Module's. DDP and `fully_shard` ask each module, before they change anything: here they are refused if
        they take ranks for replicas that hold different shards.

        Raises:
            MeshError: as `check_replicas_alike`.
        """
        if not torch.compiler.is_compiling():
            check_replicas_alike(self._shardings, type(self).__name__)
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def declare(
        self,
        name: str,
        storage: str,
        sizes: Mapping[str, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        merged: tuple[int, ...] | None = None,
    ) -> None:
        """Make an uninitialised parameter: this rank's part of a global tensor.

        Args:
            storage: how it is stored, such as `W[m/tp,d]`.
            sizes: the global size of each of its letters (others are ignored).
            merged: as of `ParamSharding`.
        """
        spec = parse_tensor(storage)
        sharding = ParamSharding(spec, tuple(sizes[letter] for letter in spec.letters), self.mesh, merged)
        self._shardings[name] = sharding
        where = view(self.mesh).device if device is None else device
        self.register_parameter(name, nn.Parameter(torch.empty(sharding.local_shape, device=where, dtype=dtype)))

    def fill(self, name: str, values: Fill, generator: torch.Generator | None = None) -> None:
        """Set a parameter to `values(seed, global shape, starts, lengths)`.

        One seed is drawn from torch's generator, on every rank; that of the first rank of the layer's axes is used, so
        the shards belong together however the ranks were seeded.

        Raises:
            DisagreementError: the ranks build different layers.
        """
        parameter = self.get_parameter(name)
        if is_fake(parameter):
            return  # it has no values
        seed = draw_seed(generator)
        if parameter.is_meta:
            return
        sharding = self._shardings[name]
        mesh_view = view(self.mesh)
        lines = [f"{type(self).__name__}.{name} of {parameter.dtype}"]
        lines += [f"{n}: {s.spec} of global shape {s.shape}" for n, s in self._shardings.items()]
        text = "\n".join(lines)
        for axis in self._axes:
            seed = share_first(mesh_view.axis(axis), text, seed, "a layer being built")
        starts, lengths = sharding.block()
        with torch.no_grad():
            parameter.copy_(values(seed, sharding.shape, starts, lengths).view_as(parameter))
