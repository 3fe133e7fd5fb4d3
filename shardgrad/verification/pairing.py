"""Which tensor of the parallel model is which of the single one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardgrad.comm.mesh import MeshView
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout.sizes import rule
from shardgrad.verification import splits as how
from shardgrad.verification.exchange import tensors_of_all
from shardgrad.verification.observed import Split

Names = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True)
class Pair:
    """One parameter in both models.

    name, single_name: in the parallel model and in the single one.
    shape: the global shape as the parallel model stores it; single_shape: as the single one has it.
    unsummed: axes over which its gradient is left as terms of a sum.
    """

    name: str
    single_name: str
    parameter: nn.Parameter
    split: Split
    shape: tuple[int, ...]
    single_shape: tuple[int, ...]
    unsummed: tuple[str, ...] = ()

    def to_single(self, tensor: Tensor) -> Tensor:
        """A tensor of the parallel model's global shape in the single model's; padding is dropped."""
        return fit(tensor, self.single_shape)


def fit(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor in another shape: dims joined or parted, in row-major order, or rows added (zeros) or dropped."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    if tensor.numel() == torch.Size(shape).numel():
        return tensor.reshape(shape)
    made = tensor.new_zeros(shape)
    both = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape))
    made[both] = tensor[both]
    return made


def same_but_joined(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether one shape is the other with neighbouring dims joined, so that row-major order is the same."""
    first, second = (set(accumulate(shape, mul)) | {1} for shape in (a, b))
    return torch.Size(a).numel() == torch.Size(b).numel() and (first <= second or second <= first)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def translate(names: Names | None, name: str) -> str:
    if names is None:
        return name
    return names(name) if callable(names) else names.get(name, name)


def pair(
    parallel: nn.Module,
    single: nn.Module,
    mesh: MeshView,
    given: how.Splits,
    names: Names | None,
    padded: Sequence[str],
) -> tuple[list[Pair], list[list[Tensor]]]:
    """Every parameter of the parallel model with the single model's; and what every rank holds of it.

    Raises:
        LayoutError: a name or a split is missing or ambiguous.
        ShapeError: shapes do not fit together.
        ValueError: a parameter is complex.
    """
    targets = dict(single.named_parameters(remove_duplicate=False))
    shardings = how.shardings_by_layers(parallel)
    first_names = {id(parameter): name for name, parameter in single.named_parameters()}
    pairs, everyones = [], []
    used: set[int] = set()
    for name, parameter in parallel.named_parameters():
        single_name = translate(names, name)
        if single_name not in targets:
            said = "" if single_name == name else f" (parallel's {name})"
            raise LayoutError(
                f"single has no parameter {single_name!r}{said}{how.nearest(single_name, list(targets))}. Give "
                "names={parallel's name: single's name}, or a function"
            )
        if parameter.is_complex():
            raise ValueError(f"{name} is complex, and only real numbers are compared: hold it as torch.view_as_real")
        used.add(id(targets[single_name]))
        single_name = first_names[id(targets[single_name])]
        single_shape = tuple(targets[single_name].shape)
        held = [part for part in tensors_of_all(local_part(parameter), mesh) if part is not None]
        shapes = [tuple(part.shape) for part in held]
        split = _split(name, parameter, single_shape, shapes, shardings, mesh, given)
        unsummed = split.partial or how.unsummed_by_megatron(parameter, mesh, name)
        split = split.summed_over(())
        shape = how.whole_shape(split, shapes, mesh, name)
        _check_shape(name, shape, single_name, single_shape, split, name in padded)
        pairs.append(Pair(name, single_name, parameter, split, shape, single_shape, unsummed))
        everyones.append(held)
    unused = [name for name, parameter in targets.items() if id(parameter) not in used]
    if unused:
        raise LayoutError(
            f"single's {', '.join(unused[:5])} {'is' if len(unused) == 1 else 'are'} no parameter of parallel's"
            f"{how.nearest(unused[0], [one.name for one in pairs])}. Give names={{parallel's name: single's name}}"
        )
    for name in padded:
        if name not in {one.name for one in pairs}:
            raise LayoutError(f"padded: no parameter is called {name!r}{how.nearest(name, [p.name for p in pairs])}")
    return pairs, everyones


def _split(
    name: str,
    parameter: Tensor,
    single_shape: tuple[int, ...],
    shapes: list[tuple[int, ...]],
    shardings: dict,
    mesh: MeshView,
    given: how.Splits,
) -> Split:
    said = given.get(name, parameter.dim())
    if said is not None:
        return said
    if isinstance(parameter, DTensor):
        return how.of_dtensor(parameter, mesh, name)
    if id(parameter) in shardings:
        return how.of_sharding(shardings[id(parameter)], mesh, name)
    megatron = how.of_megatron(parameter, mesh, name)
    if megatron is not None:
        return megatron
    found = list(how.candidates(single_shape, shapes, mesh))
    if len(found) == 1:
        return found[0]
    hint = f"give splits={{{name!r}: 'W[…]'}}, with a letter for each dim and /axis after those that are sharded"
    if found:
        raise LayoutError(f"{name} could be sharded as {' or '.join(map(str, found[:4]))}: {hint}")
    if len(set(shapes)) == 1 and same_but_joined(shapes[0], single_shape):
        return Split.of([()] * len(shapes[0]))
    if rule(*mesh.shape.values()) == "balanced":
        hint += " (the mesh shards balanced: sg.set_balanced)"
    raise LayoutError(
        f"no way to shard {single_shape}, the shape that {name} has in single, gives the ranks' shapes "
        f"{', '.join(map(str, dict.fromkeys(shapes)))}: {hint}"
    )


def _check_shape(
    name: str, shape: tuple[int, ...], single_name: str, single_shape: tuple[int, ...], split: Split, padded: bool
) -> None:
    if shape == single_shape or same_but_joined(shape, single_shape):
        return
    longer = len(shape) == len(single_shape) and all(a >= b for a, b in zip(shape, single_shape))
    if longer and padded:
        return
    remedy = f"; if it is padded, say padded=[{name!r}]" if longer else ""
    raise ShapeError(
        f"{name} has global shape {shape} (stored as {split}), but single's {single_name} has {single_shape}{remedy}"
    )
