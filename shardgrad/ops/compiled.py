"""Products as torch.compile sees them: one operator for forward and one for backward, opaque, and kept in order.

A compiled graph holds tensors, numbers and strings; it names a bound product by its handle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardgrad.comm import shim
from shardgrad.comm.agree import checking_every_call
from shardgrad.comm.trace import traced_op
from shardgrad.errors import MeshError
from shardgrad.ops import handles
from shardgrad.ops.deferred import deferring

if TYPE_CHECKING:
    from shardgrad.layout.lower import Products
    from shardgrad.ops.executable import Executable


def run(bound: Any, tensors: Sequence[Tensor], sizes: Mapping[str, int] | None) -> tuple[Tensor, ...]:
    """What `bound(tensors, …)` computes, in a graph. Called where torch.compile traces."""
    grad = torch.is_grad_enabled()
    needs = [grad and tensor.requires_grad for tensor in tensors]
    known = dict(sizes or {})
    made = torch.ops.shardgrad.product(bound.handle, tensors, needs, ",".join(known), list(known.values()))
    return tuple(made[: bound.count])


class _Shapes:
    """What a graph knows of a call: which tensors come and go, of which shapes.

    needs: whether X, each weight and each bias needs a gradient.
    """

    def __init__(self, products: Products, needs: Sequence[bool]) -> None:
        self.products, self.needs = products, tuple(needs)
        self._saved = products.saved(self.needs)
        self._returned = [key for key in self._saved if key in products.saved_gathered]

    def shapes(self) -> list[tuple[int, ...]]:
        """Of what forward returns: every Y, and what is saved as gathered."""
        p = self.products
        made = [p.sizes.shape_of(plan.stored["out"]) for plan in p.plans]
        return [*made, *(p.sizes.shape_of(p.plans[at].gather[role][-1].after) for role, at in self._returned)]

    def saved(self, tensors: Sequence[Tensor], returned: Sequence[Tensor]) -> list[Tensor]:
        """What backward reads, of the arguments of forward and of what it returned."""
        gathered = dict(zip(self._returned, returned[self.products.count :]))
        return [gathered.get(key, tensors[0 if key[0] == "lhs" else 1 + key[1]]) for key in self._saved]

    def has_gradients(self, has_grad: Sequence[bool]) -> list[bool]:
        """For X, each weight and each bias, whether backward makes a gradient, given the dYs that there are."""
        p = self.products
        computed = p.taking_part(has_grad)
        made = [any(computed), *computed, *(computed[at] for at in p.biases)]
        return [need and is_made for need, is_made in zip(self.needs, made)]


class _GraphFunctions:
    """Forward and backward of an executable as two functions, with what backward needs in the hands of the caller."""

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        self.forward: Callable[..., tuple[Tensor, ...]] = executable.forward_function(returns_saved=True)

    def backward(self, saved: Sequence[Tensor], dys: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients that there are."""
        return [grad for grad in self.executable.gradients(dys, saved) if grad is not None]


def _bound(handle: str) -> Any:
    bound = handles.named(handle)
    if bound is None:
        raise MeshError(
            f"this graph was compiled for a product of a mesh that is gone ({handle}): torch.compiler.reset()"
        )
    return bound


def _given(letters: str, sizes: Sequence[int]) -> dict[str, int] | None:
    return dict(zip(letters.split(","), sizes)) if letters else None


def _traced(handle: str, like: Sequence[Tensor], needs: Sequence[bool], letters: str, sizes: Sequence[int]) -> _Shapes:
    return _Shapes(_bound(handle).traced(like, _given(letters, sizes)), needs)


def _find(
    handle: str, like: Sequence[Tensor], needs: Sequence[bool], letters: str, sizes: Sequence[int]
) -> _GraphFunctions:
    executable = _bound(handle).executable_for_graph(like, _given(letters, sizes), tuple(needs))
    if executable.graph_functions is None:
        executable.graph_functions = _GraphFunctions(executable)
    return executable.graph_functions


def _own(results: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The results as operators must give them: contiguous, and none in memory of an input or of another."""
    taken = {t.untyped_storage().data_ptr() for t in inputs if t is not None and t.numel()}
    made = []
    for result in results:
        own = result.contiguous()
        where = own.untyped_storage().data_ptr()
        if own.numel() and where in taken:
            own = own.clone()
        taken.add(where)
        made.append(own)
    return made


@torch.library.custom_op(
    "shardgrad::product",
    mutates_args=(),
    schema="(str handle, Tensor[] tensors, bool[] needs, str letters, SymInt[] sizes) -> Tensor[]",
)
@traced_op
def product_forward(
    handle: str, tensors: Sequence[Tensor], needs: Sequence[bool], letters: str, sizes: Sequence[int]
) -> list[Tensor]:
    """Every Y, and then the operands that are kept as gathered."""
    functions = _find(handle, tensors, needs, letters, sizes)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return _own(functions.forward(*tensors), tensors)


@product_forward.register_fake
def _(
    handle: str, tensors: Sequence[Tensor], needs: Sequence[bool], letters: str, sizes: Sequence[int]
) -> list[Tensor]:
    traced = _traced(handle, tensors, needs, letters, sizes)
    return [tensors[0].new_empty(shape) for shape in traced.shapes()]


@torch.library.custom_op(
    "shardgrad::product_backward",
    mutates_args=(),
    schema="(str handle, Tensor[] saved, Tensor?[] dys, SymInt[] shapes, bool[] needs, str letters, SymInt[] sizes)"
    " -> Tensor[]",
)
@traced_op
def product_backward(
    handle: str,
    saved: Sequence[Tensor],
    dys: Sequence[Tensor | None],
    shapes: Sequence[int],
    needs: Sequence[bool],
    letters: str,
    sizes: Sequence[int],
) -> list[Tensor]:
    """The gradients that there are, of X, each weight and each bias."""
    if deferring():
        raise RuntimeError(
            "weight gradients of a compiled product cannot be deferred: its backward is one operator. Leave out "
            "sg.defer_weight_grads(), or torch.compile"
        )
    like = _like(dys, shapes, needs)
    functions = _find(handle, like, needs, letters, sizes)
    if checking_every_call():
        functions.executable.check(dys)
    with torch.autocast(like[0].device.type, enabled=False):
        return _own(functions.backward(saved, dys), (*saved, *dys))


@product_backward.register_fake
def _(
    handle: str,
    saved: Sequence[Tensor],
    dys: Sequence[Tensor | None],
    shapes: Sequence[int],
    needs: Sequence[bool],
    letters: str,
    sizes: Sequence[int],
) -> list[Tensor]:
    like = _like(dys, shapes, needs)
    has_grad = _traced(handle, like, needs, letters, sizes).has_gradients([dy is not None for dy in dys])
    return [torch.empty_like(tensor) for tensor, has in zip(like, has_grad) if has]


def _like(dys: Sequence[Tensor | None], shapes: Sequence[int], needs: Sequence[bool]) -> list[Tensor]:
    """Tensors as the call of forward was given them, without values: backward's executable is found by their shapes."""
    dy = next(dy for dy in dys if dy is not None)
    rest: Iterator[int] = iter(shapes)
    # Each shape is its number of dims, and then its sizes.
    return [dy.new_empty([next(rest) for _ in range(next(rest))]) for _ in needs]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    handle, tensors, needs, letters, sizes = inputs
    traced = _traced(handle, tensors, needs, letters, sizes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*traced.saved(tensors, output))
    shapes = [number for tensor in tensors for number in (tensor.dim(), *tensor.shape)]
    ctx.rest = shapes, list(needs), letters, list(sizes)
    ctx.handle, ctx.count = handle, traced.products.count


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    dys = grads[: ctx.count]
    shapes, needs, letters, sizes = ctx.rest
    nothing: list[Tensor] | None = None if sizes else []  # torch takes an empty list for one of tensors
    if all(dy is None for dy in dys):
        return None, [None] * len(needs), None, None, nothing
    like = _like(dys, shapes, needs)
    traced = _traced(ctx.handle, like, needs, letters, sizes)
    made = iter(torch.ops.shardgrad.product_backward(ctx.handle, list(ctx.saved_tensors), dys, *ctx.rest))
    has_grad = traced.has_gradients([dy is not None for dy in dys])
    return None, [next(made) if has else None for has in has_grad], None, None, nothing


product_forward.register_autograd(_backward, setup_context=_setup)
for _operator in (product_forward, product_backward):
    shim.ordered(_operator)
