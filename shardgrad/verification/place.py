"""Which recorded tensor of the parallel model is which of the single one, and how it lies on the mesh."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import permutations
from math import inf

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from shardgrad.comm.mesh import MeshView
from shardgrad.errors import LayoutError
from shardgrad.nn.features import MergedDim, StoredOutput
from shardgrad.verification import exchange
from shardgrad.verification import splits as how
from shardgrad.verification.fingerprint import fingerprint
from shardgrad.verification.observed import Kind, Split
from shardgrad.verification.pairing import Names, Pair, fit, local_part, same_but_joined, translate
from shardgrad.verification.record import WHOLE, Key, Recording

_DIMS = 8
_OF_PARAMETERS: tuple[Kind, ...] = ("gradient", "step", "second step")


@dataclass(frozen=True)
class Place:
    """One tensor to compare.

    single: its key in the single model's recordings.
    split, shape: how it lies on the mesh, and the global shape that is so sharded; larger than the single model's where
        padded.
    """

    single: Key
    split: Split
    shape: tuple[int, ...]


def modules_of(parallel: nn.Module, single: nn.Module, pairs: Sequence[Pair], names: Names | None) -> dict[str, str]:
    """Parallel's modules by single's: as `names` says, as their parameters' names say, else of the same name."""
    theirs = {name for name, _ in single.named_modules()}
    owners = {}
    for one in pairs:
        (own, _, leaf), (other, _, other_leaf) = one.name.rpartition("."), one.single_name.rpartition(".")
        if leaf == other_leaf:
            owners[own] = other
    found = {}
    for name, _ in parallel.named_modules():
        for candidate in (translate(names, name), owners.get(name, name), name):
            if candidate in theirs:
                found[candidate] = name
                break
    return found


class Placer:
    """Finds the place of every tensor that a run of the parallel model recorded.

    said: how layers say that what they return is stored. Where some do, nothing is guessed of the modules between them:
        what those return is compared if its values are right in a place that it may have, or if it is whole and the
        same on all ranks. `unsure` has all else: if it is wrong, it may be that its place is not known.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        modules: dict[str, str],
        padded: Sequence[str],
        mesh: MeshView,
        given: how.Splits,
        said: Mapping[str, StoredOutput],
        skip: Collection[str],
    ) -> None:
        self._skip, self._skips = skip, set[str]()
        self.pairs, self.modules, self.mesh, self.given = {one.name: one for one in pairs}, modules, mesh, given
        self.longer = {
            small: large
            for one in pairs
            if one.name in padded
            for small, large in zip(one.single_shape, one.shape)
            if small != large
        }
        self.said = said
        self.known = _known(said)
        self.unsure: set[Key] = set()
        self.skipped: dict[str, str] = {}
        self.names = list(self.pairs)  # what `splits` may speak of

    def places(self, parallel: Recording, exact: Recording) -> dict[Key, Place]:
        """For every tensor that can be compared, by parallel's kind and name; the same on every rank.

        DTensors that are partial sums are summed in place. Outputs of which the place cannot be known are noted in
        `skipped`.
        """
        partners = self._partners(exact)
        shapes_of, calls_of = self._shapes(list(partners), parallel)
        same_on_all = self._same_on_all(list(partners), parallel) if self.said else set()
        found: dict[Key, Place] = {}
        for key, single in partners.items():
            kind, name = key
            if self._left_out(kind, name):
                continue
            tensor = _reduced(parallel, key)
            shapes = shapes_of[key]
            if kind in _OF_PARAMETERS:
                held = [shape is not None for shape in shapes]
                if any(held) if single not in exact.tensors or kind != "gradient" else True:
                    found[key] = self._of_parameter(self.pairs[name], key, single, tensor)
                continue
            if any(shape is None for shape in shapes):
                if kind == "input gradient" and all(shape is None for shape in shapes):
                    self.skipped[f"{kind} of {name}"] = "parallel detaches it, or takes its inputs from elsewhere"
                elif kind == "input gradient" and name in parallel.inputs:  # then it should have one
                    whole = exact.tensors[single]
                    found[key] = Place(single, Split.of([()] * whole.dim()), tuple(whole.shape))
                elif kind not in ("norm", "buffer"):
                    self.skipped[f"{kind} of {name}"] = "parallel has none, or not on every rank"
                continue
            called = exact.calls.get(path_of(single[1]), 0)
            if kind in ("output", "output gradient") and any(calls != called for calls in calls_of[key]):
                times = ", ".join(map(str, dict.fromkeys(calls_of[key])))
                self.skipped[f"{kind} of {name}"] = f"parallel calls it {times} times, single {called} times"
                continue
            if kind == "output" and self._repeats(parallel, exact, partners, name):
                continue
            if kind == "output gradient" and ("output", name) not in found:
                continue
            of_output = found.get(("output", name)) if kind == "output gradient" else None
            place = self._of_output(key, single, tensor, [s for s in shapes if s is not None], exact, of_output)
            if place is None:
                local = ", ".join(str(shape) for shape in dict.fromkeys(shapes))
                shape = tuple(exact.tensors[single].shape)
                turned = self.turned(next(s for s in shapes if s is not None), shape)
                self.skipped[f"{kind} of {name}"] = f"no split of {shape} gives {local}{turned}; name it in splits"
            else:
                found[key] = place
                if self.said and kind in ("output", "output gradient") and not self._sure(key, place, same_on_all):
                    self.unsure.add(key)
        return found

    def _sure(self, key: Key, place: Place, same_on_all: set[Key]) -> bool:
        """Whether a tensor must be what its place says: a layer or the user said it, or it is whole on all ranks."""
        kind, name = key
        if self.given.get(name if kind == "output" else f"{name}.grad") is not None:
            return True
        stored = self._stored(name)
        if stored is not None and (kind == "output" or stored.features.once):
            return True
        return key in same_on_all and not place.split.spec.axes

    def _left_out(self, kind: str, name: str) -> bool:
        """Whether the user asked to skip all tensors of a name, or an output's gradient (`name.grad`)."""
        names = (name, f"{name}.grad") if kind == "output gradient" else (name,)
        for pattern in self._skip:
            if any(one == pattern or fnmatchcase(one, pattern) for one in names):
                self._skips.add(pattern)
                self.skipped[f"{kind} of {name}"] = "as was asked"
                return True
        return False

    def check_used(self) -> None:
        """Refuse what fits nothing, in `splits` and in `skip`.

        Raises:
            LayoutError: with the nearest names.
        """
        self.given.check_used(self.names)
        for pattern in self._skip:
            if pattern not in self._skips:
                raise LayoutError(f"skip: nothing is called {pattern!r}{how.nearest(pattern, self.names)}")

    def name_in_parallel(self, name: str) -> str:
        """What parallel calls a buffer of single's."""
        path, _, leaf = name.rpartition(".")
        own = self.modules.get(path, path)
        return f"{own}.{leaf}" if own else leaf

    def turned(self, local: Sequence[int], whole: Sequence[int]) -> str:
        """`, but of …` if the dims of a local shape would fit single's in another order; else nothing."""
        if len(local) != len(whole):
            return ""
        for order in permutations(range(len(whole))):
            other = tuple(whole[at] for at in order)
            if (
                other != tuple(whole)
                and all(a == b or a < b for a, b in zip(local, other))
                and (sum(a != b for a, b in zip(local, other)) <= 1)
            ):
                return f", but one of {other} does: its dims stand in another order than single's"
        return ""

    def _stored(self, name: str) -> StoredOutput | None:
        return None if "[" in name else self.said.get(path_of(name))

    def of_result(self, result: Tensor, exact: Tensor) -> Place | None:
        """Where the model's own output lies, whose gradient is to be given."""
        if isinstance(result, DTensor):
            if not same_but_joined(result.shape, exact.shape):
                return None
            split = how.of_dtensor(result, self.mesh, WHOLE)
            return Place(("output", WHOLE), split.summed_over(()), tuple(result.shape))
        shapes = [tuple(row) for row in exchange.ints_of_all(list(result.shape), self.mesh)]
        return self._found(WHOLE, ("output", WHOLE), shapes, result, exact)

    def _partners(self, exact: Recording) -> dict[Key, Key]:
        """Parallel's key → single's, for all that single computed and all gradients, in the order of execution."""
        partners: dict[Key, Key] = {}
        by_single: dict[str, list[str]] = {}
        for one in self.pairs.values():
            by_single.setdefault(one.single_name, []).append(one.name)
        for kind, name in exact.tensors:
            if kind in ("output", "output gradient"):
                path, mark = path_of(name), _base(name)[1]
                if path not in self.modules:
                    self.skipped[f"{kind} of {name}"] = "parallel has no module of that name"
                    continue
                own = (self.modules[path] or WHOLE) + mark
                self.names += [own, f"{own}.grad"] if kind == "output" else []
                partners[kind, own] = (kind, name)
            elif kind == "buffer":
                partners[kind, self.name_in_parallel(name)] = (kind, name)
            elif kind not in _OF_PARAMETERS:
                self.names.append(name)
                partners[kind, name] = (kind, name)
        for kind in _OF_PARAMETERS:
            if kind != "second step" or any(found == kind for found, _ in exact.tensors):
                partners |= {(kind, one.name): (kind, one.single_name) for one in self.pairs.values()}
        return partners

    def _shapes(
        self, keys: list[Key], parallel: Recording
    ) -> tuple[dict[Key, list[tuple[int, ...] | None]], dict[Key, list[int]]]:
        """The shape of every rank's tensor, and how often every rank called its module; one exchange for all."""
        header: list[int] = []
        for key in keys:
            tensor = parallel.tensors.get(key)
            shape = [] if tensor is None else list(local_part(tensor).shape)
            calls = parallel.calls.get(path_of(key[1]), 0)
            header += [calls, -1 if tensor is None else len(shape), *shape[:_DIMS], *[0] * (_DIMS - len(shape))]
        rows = exchange.ints_of_all(header, self.mesh)
        starts = dict(zip(keys, range(0, len(header), _DIMS + 2)))
        shapes = {
            key: [None if row[at + 1] < 0 else tuple(row[at + 2 : at + 2 + row[at + 1]]) for row in rows]
            for key, at in starts.items()
        }
        return shapes, {key: [row[at] for row in rows] for key, at in starts.items()}

    def _same_on_all(self, keys: list[Key], parallel: Recording) -> set[Key]:
        """Those of which every rank has the same bits (or nothing); one exchange."""
        found = [parallel.tensors.get(key) for key in keys]
        mine = [0 if tensor is None else int(fingerprint(local_part(tensor))) for tensor in found]
        rows = exchange.ints_of_all(mine, self.mesh)
        return {key for at, key in enumerate(keys) if len({row[at] for row in rows}) == 1}

    def _of_parameter(self, one: Pair, key: Key, single: Key, tensor: Tensor | None) -> Place:
        if isinstance(tensor, DTensor):
            return Place(single, how.of_dtensor(tensor, self.mesh, one.name), one.shape)
        if key[0] != "gradient":
            return Place(single, one.split, one.shape)
        return Place(single, one.split.summed_over(one.unsummed), one.shape)

    def _of_output(
        self,
        key: Key,
        single: Key,
        tensor: Tensor | None,
        shapes: list[tuple[int, ...]],
        exact: Recording,
        of_output: Place | None,
    ) -> Place | None:
        kind, name = key
        whole = exact.tensors[single]
        if kind == "norm":
            return Place(single, Split.of([]), ())
        if isinstance(tensor, DTensor):
            if not same_but_joined(tensor.shape, whole.shape) and tensor.shape[:-1] != whole.shape[:-1]:
                return None  # a padded vocabulary may be longer
            return Place(single, how.of_dtensor(tensor, self.mesh, name), tuple(tensor.shape))
        if of_output is not None:
            said = self.given.get(f"{name}.grad", whole.dim())
            if said is not None:
                return Place(single, said, of_output.shape)
            split = of_output.split.summed_over(())
            if shapes == [self._local(split, of_output.shape, at) for at in exchange.coordinates(self.mesh)]:
                return Place(single, split, of_output.shape)
        return self._found(name, single, shapes, tensor, whole)

    def _found(
        self, name: str, single: Key, shapes: list[tuple[int, ...]], tensor: Tensor | None, whole: Tensor
    ) -> Place | None:
        """As the user says, else the split that gives every rank the shape that it has; of several, the one whose
        values are nearest."""
        said = self.given.get(name, whole.dim())
        shape = tuple(whole.shape)
        stored = self._stored(name)
        if said is not None:
            return Place(single, said, how.whole_shape(said, shapes, self.mesh, name))
        if stored is not None and shape and shape[-1] == stored.features.size:
            found = how.of_output(stored, shape, shapes, self.mesh)
        else:
            found = list(how.candidates(shape, shapes, self.mesh, self.known))
        if not found and shape and shape[-1] in self.longer:
            shape = (*shape[:-1], self.longer[shape[-1]])
            found = list(how.candidates(shape, shapes, self.mesh))
        if len(found) > 1 and tensor is not None:
            full = fit(whole.double(), shape)
            far = [
                float((tensor.double() - split.shard(full, self.mesh.shape, self.mesh.coordinate)).square().sum())
                for split in found
            ]
            mine = torch.tensor(far, dtype=torch.float64, device=self.mesh.device)
            every = exchange.same_shape_of_all(mine, self.mesh)
            return Place(single, found[int(every.sum(0).nan_to_num(inf).argmin())], shape)
        return Place(single, found[0], shape) if found else None

    def _local(self, split: Split, shape: tuple[int, ...], coordinate: dict[str, int]) -> tuple[int, ...]:
        return tuple(len(index) for index in split.indices(shape, self.mesh.shape, coordinate))

    @staticmethod
    def _repeats(parallel: Recording, exact: Recording, partners: dict[Key, Key], name: str) -> bool:
        """Whether an output is an earlier one's very tensor, in both models: it is compared once."""
        earlier = parallel.same.get(name)
        if earlier is None or ("output", earlier) not in partners:
            return False
        return exact.same.get(partners["output", name][1]) == partners["output", earlier][1]


def _base(name: str) -> tuple[str, str]:
    """`fc1#2[1]` is fc1, in its second call, its second tensor: the module and the mark."""
    at = min((name.find(mark) for mark in "#[" if mark in name), default=len(name))
    return name[:at], name[at:]


def path_of(name: str) -> str:
    """The module whose output a name is, as `named_modules` has it."""
    base = _base(name)[0]
    return "" if base == WHOLE else base


def _known(said: Mapping[str, StoredOutput]) -> list[MergedDim]:
    """Features that a rank has a part of: as layers return them, and each letter and part of theirs alone."""
    found: dict[MergedDim, None] = {}
    for stored in said.values():
        for part in stored.features.parts:
            letters = [replace(part, letters=(one,), sizes=(size,)) for one, size in zip(part.letters, part.sizes)]
            found |= dict.fromkeys(MergedDim((one,)) for one in (part, *letters))
        found[stored.features] = None
    return [dim for dim in found if dim.axes]


def _reduced(recording: Recording, key: Key) -> Tensor | None:
    """The recorded tensor; a DTensor that is a partial sum is summed first."""
    tensor = recording.tensors.get(key)
    if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
        whole = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
        tensor = recording.tensors[key] = tensor.redistribute(placements=whole)
    return tensor
