"""How the tensors of a model lie on the mesh: said by the user, known from their layers, or found from their shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import permutations, product
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardgrad.comm.mesh import MeshView
from shardgrad.errors import LayoutError, MeshError, ShapeError
from shardgrad.layout.notation import Dim, TensorSpec, parse_tensor
from shardgrad.layout.sizes import rule
from shardgrad.nn.features import MergedDim, StoredOutput
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.sharding import ParamSharding
from shardgrad.verification.exchange import coordinates
from shardgrad.verification.observed import Split

Named = Mapping[str, "str | TensorSpec | Split"]
"""A tensor's name, or a pattern such as `blocks.*.up.weight`, with `"W[m/tp,d]"`; `"W[2*m/tp,d]"` where a dim consists
of two parts (gate and up), each of them sharded: Megatron's `partition_stride`."""
_PARTS = re.compile(r"(?<=[\[,])\s*(\d+)\s*\*\s*")


class Splits:
    """What the user said of how tensors are split, by name or pattern; each entry must be for something.

    Raises:
        LayoutError, MeshError: an entry cannot be read, or names an axis that the mesh lacks.
    """

    def __init__(self, named: Named, mesh: MeshView) -> None:
        self._named = {pattern: _read(pattern, how, mesh) for pattern, how in named.items()}
        self._used: set[str] = set()

    def get(self, name: str, dims: int | None = None) -> Split | None:
        """The first entry whose pattern fits the name.

        Raises:
            ShapeError: the tensor has another number of dims than the entry.
        """
        for pattern, split in self._named.items():
            if pattern == name or fnmatchcase(name, pattern):
                self._used.add(pattern)
                if dims is not None and dims != len(split.spec.dims):
                    raise ShapeError(f"splits: {pattern!r} is {split}, but {name} has {dims} dims")
                return split
        return None

    def check_used(self, names: Sequence[str]) -> None:
        """Refuse entries that fit nothing, which would mean a tensor compared as something else than was said.

        Raises:
            LayoutError: with the nearest names.
        """
        for pattern in self._named:
            if pattern not in self._used:
                raise LayoutError(f"splits: nothing is called {pattern!r}{nearest(pattern, names)}")


def nearest(name: str, names: Sequence[str]) -> str:
    """`; the nearest names are …`, or all names where none is near and there are few."""
    found = get_close_matches(name, names, n=3, cutoff=0.5)
    if found:
        return f"; the nearest names are {', '.join(found)}"
    return f"; there are {', '.join(names)}" if 0 < len(names) <= 12 else ""


def _read(name: str, how: Any, mesh: MeshView) -> Split:
    if isinstance(how, Split):
        split = how
    elif isinstance(how, TensorSpec):
        split = Split(how)
    elif isinstance(how, str):
        parts = {int(count) for count in _PARTS.findall(how)}
        if len(parts) > 1:
            raise LayoutError(f"splits: {name!r}: {how!r} has dims of {' and of '.join(map(str, sorted(parts)))} parts")
        spec = parse_tensor(_PARTS.sub("", how))
        # A single tensor's braces are read as an operand's, whose gradient is partial; here its value is meant.
        split = Split(TensorSpec(spec.name, spec.dims, partial=spec.grad_partial), stride=max(parts, default=1))
    else:
        raise LayoutError(f"splits: {name!r} must be text such as 'W[m/tp,d]', instead), not {type(how).__name__}")
    mesh.require((*split.spec.axes, *split.partial), f"splits: {name!r}")
    return split


def of_dtensor(tensor: DTensor, mesh: MeshView, name: str) -> Split:
    """A DTensor's placements, its mesh's axes found by name in the mesh.

    Raises:
        MeshError: its mesh has an axis that the mesh lacks.
        LayoutError: a placement that is not known.
    """
    names = tensor.device_mesh.mesh_dim_names or (tuple(mesh.axes) if len(mesh.axes) == tensor.device_mesh.ndim else ())
    if len(names) != tensor.device_mesh.ndim or any(axis not in mesh.axes for axis in names):
        raise MeshError(
            f"{name} is a DTensor on {tensor.device_mesh}; its axes are not among those of the mesh given, "
            f"{', '.join(mesh.axes)}: verify with a mesh that has all of them"
        )
    axes: list[list[str]] = [[] for _ in range(tensor.dim())]
    partial = []
    strided: list[tuple[int, str]] = []
    factors: dict[int, int] = {}
    for axis, placement in zip(names, tensor.placements):
        if mesh.shape[axis] == 1 or placement.is_replicate():
            continue
        if placement.is_partial():
            partial.append(axis)
        elif type(placement).__name__ == "_StridedShard":  # FSDP2 over tensor parallel: sharded after the others
            strided.append((placement.dim, axis))  # type: ignore[attr-defined]
            factors[placement.dim] = placement.split_factor  # type: ignore[attr-defined]
        elif placement.is_shard():
            axes[placement.dim].append(axis)  # type: ignore[attr-defined]
        else:
            raise LayoutError(f"{name} has the placement {placement} on axis {axis!r}, which verify does not know")
    stride = 1
    for dim, axis in strided:
        inner = prod(mesh.shape[other] for other in axes[dim])
        stride = max(stride, factors[dim] // inner)  # of parts that follow one another: transformers' packed_colwise
        axes[dim].append(axis)
    return Split.of(axes, partial, stride, name="T")


def shardings_by_layers(model: nn.Module) -> dict[int, ParamSharding]:
    """How shardgrad's layers store their parameters, by the parameter's identity."""
    return {
        id(getattr(owner, name)): sharding
        for owner in model.modules()
        if isinstance(owner, ShardedModule)
        for name, sharding in owner.shardings().items()
        if getattr(owner, name) is not None
    }


def of_sharding(sharding: ParamSharding, mesh: MeshView, name: str) -> Split:
    """As one of shardgrad's layers stores a parameter; terms of a sum are those of its gradient.

    Raises:
        MeshError: it is sharded over an axis that the mesh lacks.
    """
    spec = sharding.spec
    mesh.require(spec.axes, name)
    if sharding.merged is None and not sharding.parts:
        return Split(TensorSpec(spec.name, spec.dims, partial=spec.grad_partial))
    dims = sharding.merged_dims()
    plain = tuple(Dim(dim.parts[0].letters[0].letter, dim.axes) for dim in dims)
    return Split(TensorSpec(spec.name, plain, partial=spec.grad_partial), merged=tuple(enumerate(dims)))


def outputs_by_layers(model: nn.Module) -> dict[str, StoredOutput]:
    """How what layers return is stored, for those of a model that say so, by their names."""
    found = {}
    for name, module in model.named_modules():
        says = getattr(module, "stored_output", None)
        if isinstance(module, ShardedModule) and says is not None:
            found[name] = says()
    return found


def of_output(
    stored: StoredOutput, shape: Sequence[int], locals: Sequence[Sequence[int]], mesh: MeshView
) -> list[Split]:
    """How a layer's output of a global shape lies on the mesh: features as it says, rows as their sizes leave it open.

    Where somebody has gathered it since, so that every rank has all of it: whole.
    """
    last = len(shape) - 1
    lengths = [len(stored.features.indices(mesh.shape, at)) for at in coordinates(mesh)]
    said = [local[-1] for local in locals] == lengths
    if not said and all(tuple(local) == tuple(shape) for local in locals):
        return [Split.of([()] * len(shape))]
    rows = list(candidates(shape[:last], [local[:last] for local in locals], mesh)) or [Split.of([()] * last)]
    if stored.sequence:
        rows = [one for one in rows if set(stored.sequence) <= set(one.spec.dims[1].axes)] or rows
    return [_with_features(one, last, stored.features) for one in rows]


def _with_features(split: Split, dim: int, features: MergedDim) -> Split:
    """A split with one more dim, in a place."""
    axes = [one.axes for one in split.spec.dims]
    merged = tuple((at + (at >= dim), one) for at, one in split.merged)
    return Split(Split.of([*axes[:dim], features.axes, *axes[dim:]]).spec, merged=(*merged, (dim, features)))


def of_megatron(parameter: Tensor, mesh: MeshView, name: str) -> Split | None:
    """From Megatron-core's attributes on parameters; None where there are none that say it is sharded.

    Raises:
        LayoutError: the mesh has several axes and none is called tp.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    axis = _megatrons_axis(mesh, name)
    at = int(parameter.partition_dim) % parameter.dim()  # type: ignore[attr-defined]
    axes_of = [(axis,) if dim == at else () for dim in range(parameter.dim())]
    return Split.of(axes_of, stride=int(getattr(parameter, "partition_stride", 1)), name="W")


def unsummed_by_megatron(parameter: Tensor, mesh: MeshView, name: str) -> tuple[str, ...]:
    """Axes over which Megatron-core sums a parameter's gradient after backward: its `sequence_parallel`, of norms and
    biases that see a part of the sequence.

    Raises:
        LayoutError: as of `of_megatron`.
    """
    return (_megatrons_axis(mesh, name),) if getattr(parameter, "sequence_parallel", False) else ()


def _megatrons_axis(mesh: MeshView, name: str) -> str:
    axes = tuple(mesh.axes)
    if len(axes) > 1 and "tp" not in axes:
        raise LayoutError(
            f"{name} is tensor parallel by Megatron's attributes, but which of the mesh's axes {', '.join(axes)} that "
            f"is they do not say: call it tp, or give splits={{{name!r}: …}}"
        )
    return "tp" if "tp" in axes else axes[0]


def candidates(
    shape: Sequence[int], locals: Sequence[Sequence[int]], mesh: MeshView, known: Sequence[MergedDim] = ()
) -> Iterator[Split]:
    """Every way in which a global shape could be sharded, as the mesh shards, into the shapes that the ranks have.

    locals: each rank's shape, in the mesh's order. Ways with fewer axes come first.
    known: features as layers around shard them, which one dim may have as well.
    """
    if any(len(local) != len(shape) for local in locals):
        return
    yield from _chunked(shape, locals, mesh)
    everywhere = coordinates(mesh)
    for features in known:
        lengths = [len(features.indices(mesh.shape, at)) for at in everywhere]
        for dim in range(len(shape)):
            if shape[dim] == features.size and lengths == [local[dim] for local in locals]:
                rest = [(*local[:dim], *local[dim + 1 :]) for local in locals]
                for split in _chunked((*shape[:dim], *shape[dim + 1 :]), rest, mesh):
                    if not set(split.spec.axes) & set(features.axes):
                        yield _with_features(split, dim, features)


def _chunked(shape: Sequence[int], locals: Sequence[Sequence[int]], mesh: MeshView) -> Iterator[Split]:
    if all(tuple(local) == tuple(shape) for local in locals):
        yield Split.of([()] * len(shape))
        return
    names = [name for name, ranks in mesh.shape.items() if ranks > 1]
    differs = [dim for dim in range(len(shape)) if any(local[dim] != shape[dim] for local in locals)]
    orders = [order for count in range(1, len(names) + 1) for order in permutations(names, count)]
    for chosen in sorted(product(orders, repeat=len(differs)), key=lambda some: sum(map(len, some))):
        used = [axis for order in chosen for axis in order]
        if len(set(used)) < len(used):
            continue
        by_dim = dict(zip(differs, chosen))
        split = Split.of([by_dim.get(dim, ()) for dim in range(len(shape))])
        if all(
            [len(index) for index in split.indices(shape, mesh.shape, at)] == list(local)
            for at, local in zip(coordinates(mesh), locals)
        ):
            yield split


def whole_shape(split: Split, locals: Sequence[Sequence[int]], mesh: MeshView, name: str) -> tuple[int, ...]:
    """The global shape of a tensor of known split: local sizes added up along the axes that shard a dim.

    Raises:
        ShapeError: the ranks' shapes are not those of a tensor so sharded.
    """
    everywhere = coordinates(mesh)
    merged = dict(split.merged)
    shape = []
    for at, dim in enumerate(split.spec.dims):
        if at in merged:
            shape.append(merged[at].size)
            continue
        along = [place for place, c in enumerate(everywhere) if not any(c[a] for a in mesh.axes if a not in dim.axes)]
        shape.append(sum(locals[place][at] for place in along))
    for coordinate, local in zip(everywhere, locals):
        try:
            right = [len(index) for index in split.indices(shape, mesh.shape, coordinate)]
        except ValueError as error:
            raise ShapeError(f"{name}: {error}") from None
        if right != list(local):
            where = ", ".join(f"{axis}={index}" for axis, index in coordinate.items())
            raise ShapeError(
                f"{name}, stored as {split} of global shape {tuple(shape)}, should have shape {tuple(right)} at "
                f"{where} ({rule(*mesh.shape.values())}), but has {tuple(local)}"
            )
    return tuple(shape)


def assemble(locals: Sequence[Tensor], split: Split, shape: Sequence[int], mesh: MeshView) -> Tensor:
    """The global tensor from every rank's part; of replicas, the first rank's."""
    full = locals[0].new_empty(tuple(shape))
    for coordinate, local in reversed(list(zip(coordinates(mesh), locals))):
        index = [at.to(full.device) for at in split.indices(shape, mesh.shape, coordinate)]
        for dim, at in enumerate(index):
            index[dim] = at.view(-1, *[1] * (len(index) - 1 - dim))
        if index:
            full[tuple(index)] = local
        else:
            full.copy_(local)
    return full
