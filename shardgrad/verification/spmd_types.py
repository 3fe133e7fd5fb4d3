"""A second opinion: shardgrad's functions and layers under Meta's spmd_types, where it is installed.

spmd_types knows four types of a local tensor over a mesh axis, and follows them through torch: V, each rank has another
part; P, one term of a sum; R, alike on all ranks, with a gradient that is one term of a sum; I, alike on all ranks, and
so is the gradient. What shardgrad does is declared here, once; nothing of it runs but inside `typecheck`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import spmd_types as spmd
import spmd_types.checker
from spmd_types import I, P, R, SpmdTypeError, V
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm import adjoint, agree, collectives
from shardgrad.comm.mesh import Axis, MeshView, view
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import TensorSpec
from shardgrad.nn import replicated, token_statistics
from shardgrad.nn.shardings import named_shardings
from shardgrad.ops import shard
from shardgrad.ops.bound import BoundMatmul, Given

# The type over the axis before and after; a value that differs from rank to rank may be meant as a term of a sum, which
# only its use can show (an embedding's rows, zero where another rank has the id).
_PAIRS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "replicate": ((I,), R),
    "all_reduce": ((P, V), I),
    "all_gather": ((V,), R),
    "gather_replicated": ((V,), I),
    "reduce_scatter": ((P, V), V),
    "slice_replicated": ((I,), V),
    "all_to_all": ((V,), V),
    "all_to_all_rows": ((V,), V),
}


@contextmanager
def typecheck(mesh: DeviceMesh) -> Iterator[None]:
    """Inside the block, spmd_types follows every tensor, strictly: an untyped one is an error. See `annotate`, `typed`.

    Raises:
        SpmdTypeError: inside the block, where a tensor is used as what it is not.
    """
    _register()
    with _followed_products(), spmd.set_current_mesh(mesh), spmd.checker.typecheck():
        yield


@contextmanager
def _followed_products() -> Iterator[None]:
    """Each executable is code of its own (see `layout.printer`): it runs unfollowed, and its result is typed."""
    real = BoundMatmul.__call__

    def call(self: BoundMatmul, tensors: tuple[Tensor, ...], given: Given) -> Any:
        with spmd.no_typecheck():
            made = real(self, tensors, given)
            outs = made if self.count > 1 else (made,)
        _product(outs, bound=self, x=tensors[0], rest=tensors[1:])
        return made

    BoundMatmul.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        BoundMatmul.__call__ = real  # type: ignore[method-assign]


def annotate(model: nn.Module, summed: Collection[str] = ()) -> None:
    """Type every parameter of shardgrad layers by its storage.

    Args:
        summed: axes over which gradients are summed by other code after backward (data parallelism).
    """
    for _, parameter, sharding in named_shardings(model):
        if sharding is not None:
            mesh_view = view(sharding.mesh)
            types = dict[str, Any]()
            for leaf in sharding.leaves:  # a concatenation varies where one of its parts does
                types.update({a: t for a, t in _types(leaf.spec, mesh_view.axes).items() if types.get(a) is not V})
            types.update({name: R for name in summed if types.get(name) is I})
            _set(parameter, types, mesh_view)


def typed(x: Tensor, spec: TensorSpec, mesh: DeviceMesh) -> Tensor:
    """A local tensor, typed over all axes of the mesh as a layout stores it: `typed(x, layout["X"], mesh)`."""
    mesh_view = view(mesh)
    _set(x, _types(spec, mesh_view.axes), mesh_view)
    return x


def _types(spec: TensorSpec, axes: Collection[str]) -> dict[str, Any]:
    """Sharded: varying. A sum left to the caller: partial; of the gradient: replicated. Else: complete gradient."""
    special = {**dict.fromkeys(spec.axes, V), **dict.fromkeys(spec.partial, P), **dict.fromkeys(spec.grad_partial, R)}
    return {axis: special.get(axis, I) for axis in axes}


def _set(x: Tensor, types: Mapping[str, Any], mesh_view: MeshView) -> None:
    spmd.assert_type(x, {mesh_view.axes[name].group: kind for name, kind in types.items()})


def _register() -> None:
    """Declare to spmd_types what shardgrad's autograd Functions do, and what is bookkeeping: exchanges of
    sizes and texts, and the sharding of tensors that get their type afterwards."""
    rules: tuple[tuple[Any, Any], ...] = (
        (adjoint._Pair, _pair),
        (replicated._Together, _together),
        (token_statistics._Statistics, _statistics),
    )
    for function, rule in rules:
        function.spmd_typecheck = staticmethod(rule)
    for bookkeeping in (collectives.gather_ints, agree.gather_texts, shard.shard, shard.unshard):
        spmd.register_no_typecheck(bookkeeping)


def _pair(out: Tensor, *, name: str, x: Tensor, at: Any) -> None:
    before, after = _PAIRS[name]
    _expect(x, at.axis, before, f"sg.{name}")
    spmd.assert_type_like(out, x, {at.axis.group: after})


def _together(outs: tuple[Tensor, ...], *, over: Axis, tensors: Sequence[Tensor]) -> None:
    """`replicate` of several tensors, whose gradients are summed in one go."""
    for out, x in zip(outs, tensors):
        _expect(x, over, (I,), "replicate_together")
        spmd.assert_type_like(out, x, {over.group: R})


def _statistics(
    outs: tuple[Tensor | None, ...], *, logits: Tensor, other: Tensor | None, chosen: Tensor | None, over: Axis
) -> None:
    """Numbers of the whole vocabulary from its parts; every rank goes on with the same ones."""
    for part in (logits, other):
        if part is not None:
            _expect(part, over, (V,), "sharded logits")
    if chosen is not None:
        _expect(chosen, over, (I, R), "ids of sharded logits")
    for out in outs:
        if out is not None:
            spmd.assert_type(out, {**spmd.get_local_type(logits), _key(over): I})


def _product(outs: tuple[Tensor, ...], *, bound: BoundMatmul, x: Tensor, rest: Sequence[Tensor]) -> None:
    """Over the axes that a layout mentions, as it stores its tensors; over others, as torch's own product."""
    biases = iter(rest[len(bound.layouts) :])
    for layout, w, biased, y in zip(bound.layouts, rest, bound.biased, outs):
        added = next(biases) if biased else None
        tensors = [(x, layout.lhs), (w, layout.rhs)]
        tensors += [] if added is None else [(added, layout.bias)]
        types = {}
        for axis in bound.view.axes.values():
            if axis.size == 1:
                continue
            if axis.name in layout.axes:
                for tensor, spec in tensors:
                    expected = _types(spec, (axis.name,))[axis.name]
                    _expect(tensor, axis, (expected,), f"{spec} of {layout}")
                types[_key(axis)] = _types(layout.out, (axis.name,))[axis.name]
            else:
                types[_key(axis)] = _beside(tensors, axis, layout)
        spmd.assert_type(y, types)


def _beside(tensors: Sequence[tuple[Tensor, TensorSpec]], axis: Axis, layout: Layout) -> Any:
    """Over an axis that a layout does not mention every rank computes a product of its own."""
    found = [_type(tensor, axis, str(spec)) for tensor, spec in tensors]
    kinds = set(found)
    if kinds == {I}:
        return I
    if kinds <= {R, V}:
        return V if V in kinds else R
    operands, bias = found[:2], found[2:]
    if sorted(map(repr, operands)) == sorted(map(repr, (P, R))) and all(kind is P for kind in bias):
        return P
    said = ", ".join(f"{spec} is {kind!r}" for (_, spec), kind in zip(tensors, found))
    raise SpmdTypeError(f"{layout} does not mention {axis}, over which {said}: these do not go together")


def _expect(x: Tensor, axis: Axis, kinds: tuple[Any, ...], what: str) -> None:
    spmd.rules.ignore(x)  # accounted for: checked here, axis by axis
    if axis.size == 1:
        return
    found = _type(x, axis, what)
    # Without a gradient, I and R are the same.
    if found not in kinds and (x.requires_grad or not {found, *kinds} <= {I, R}):
        wanted = " or ".join(map(repr, kinds))
        raise SpmdTypeError(f"{what}: over {axis} it must be {wanted}, but it is {found!r}")


def _type(x: Tensor, axis: Axis, what: str) -> Any:
    spmd.rules.ignore(x)
    found = spmd.get_local_type(x).get(_key(axis))
    if found is None:
        raise SpmdTypeError(f"{what} has no type over {axis}: see typed() and annotate()")
    return found


def _key(axis: Axis) -> Any:
    return spmd.normalize_axis(axis.group)
