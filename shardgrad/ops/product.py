"""Products that share their first operand, bound to a mesh: whatever does not change between calls, decided once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from shardgrad.comm.agree import agree, checking_every_call
from shardgrad.comm.mesh import MeshView
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout.layout import Layout
from shardgrad.layout.plan import Move, Plan, Role, backward_phases, forward_phases
from shardgrad.layout.sizes import Sizes
from shardgrad.ops import sizing
from shardgrad.ops.bilinear import Operation
from shardgrad.ops.program import Key, Program

_MOST_SHAPES = 512  # programs remembered for a product; more than a training run has, fewer than memory minds


class Product:
    """One or more products of one input, on one mesh: one kind of product, one choice of bias, kept operands and
    reduction dtype."""

    def __init__(
        self,
        layouts: tuple[Layout, ...],
        biased: tuple[bool, ...],
        view: MeshView,
        keep: frozenset[Key],
        reduce_dtype: torch.dtype | None,
        operation: Operation,
    ) -> None:
        self.operation = operation
        self.layouts, self.biased, self.view = layouts, biased, view
        self.keep, self.reduce_dtype = keep, reduce_dtype
        self.device_type = view.device.type
        self.name = "; ".join(map(str, layouts))
        self.axes = tuple(dict.fromkeys(axis for layout in layouts for axis in layout.axes))
        view.require(self.axes, self.name)
        for layout in layouts:
            if layout.spatial != operation.spatial:
                of = f"{layout.spatial} spatial dims" if layout.spatial else "no spatial dims"
                raise LayoutError(
                    f"{layout} has {of}, but {operation} has {operation.spatial}: layouts with spatial dims are for "
                    "sg.convolve, others for sg.matmul"
                )
        # Sizes that follow from others, and that no operand tells.
        self._derived = {x for lay in layouts for x in lay.product.letters[len(lay.product.dims) - lay.spatial :]}
        self.plans: tuple[Plan, ...] = tuple(layout.plan for layout in layouts)
        self._programs: dict[object, Program] = {}

    def __deepcopy__(self, memo: object) -> Product:
        return self  # bound to process groups, and never changed by a call

    def program(self, tensors: Sequence[Tensor], given: Mapping[str, int] | None) -> Program:
        """What to run for the shapes, dtypes and flags of a call; remembered.

        tensors: the input, the weights, the biases that are there.
        """
        grad = torch.is_grad_enabled()
        key = (
            tuple([(t.shape, t.dtype, grad and t.requires_grad) for t in tensors]),
            tuple(given.items()) if given else None,
        )
        found = self._programs.get(key)
        if found is not None and not checking_every_call():
            return found
        sizes, exchanged = self._sizes(tensors, given)
        # Where sizes are exchanged, the local shapes do not tell them; they are asked for at every call.
        where = (key, tuple(sorted(sizes.known.items()))) if exchanged else key
        found = self._programs.get(where)
        if found is None:
            if len(self._programs) >= _MOST_SHAPES:
                self._programs.clear()
            dtype = tensors[0].dtype
            needs = tuple([grad and t.requires_grad for t in tensors])
            found = Program(
                self.layouts,
                self.biased,
                self.keep,
                self.view,
                sizes,
                self.reduce_dtype,
                dtype,
                needs,
                self._check_backward,
                self.operation,
            )
            self._programs[where] = found
        return found

    def forget_programs(self) -> None:
        """Decide anew, because what the decisions rest on has changed."""
        self._programs.clear()

    def _sizes(self, tensors: Sequence[Tensor], given: Mapping[str, int] | None) -> tuple[Sizes, bool]:
        count = len(self.layouts)
        weights, biases = tensors[1 : count + 1], iter(tensors[count + 1 :])
        specs, values = [self.layouts[0].first], [tensors[0]]
        for layout, weight, biased in zip(self.layouts, weights, self.biased):
            specs.append(layout.second)
            values.append(weight)
            if biased:
                specs.append(layout.bias)
                values.append(next(biases))
        self._check_kind(values, [spec.name for spec in specs])
        told = {x: size for x, size in (given or {}).items() if x not in self._derived}
        sizes = sizing.learn(specs, values, told, self.view, self.name)
        sizes.known.update(((x, ()), size) for x, size in (given or {}).items() if x in self._derived)
        self._derive(sizes)
        for name, letters in self._moved(tensors).items():
            agree(self.view, self.view.axes[name], partial(self._described, name, letters, sizes, tensors), "a product")
        missing = [level for level in sizing.unknown(self._gathering(), sizes) if level[0] not in self._derived]
        if missing:
            sizing.exchange(missing, sizes, self.view, self.name)
            self._derive(sizes)
        return sizes, bool(missing)

    def _derive(self, sizes: Sizes) -> None:
        for layout in self.layouts:
            self.operation.derive(layout, sizes)

    def _gathering(self) -> list[Move]:
        moves: list[Move] = []
        for plan, biased in zip(self.plans, self.biased):
            moves += [move for route in plan.gather.values() for move in route]
            if biased:
                moves += [*plan.bias, *plan.bias_grad, *plan.bias_grad_gathered]
        return moves

    def _check_kind(self, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        first = tensors[0]
        for tensor, name in zip(tensors, names):
            if tensor.dtype != first.dtype:
                raise ShapeError(
                    f"{name} is {tensor.dtype} but {names[0]} is {first.dtype} (in {self.name}): convert one of them; "
                    "shardgrad never changes a dtype in silence"
                )
            if tensor.device.type != self.view.device.type:
                raise ShapeError(
                    f"{name} is on {tensor.device}, but the mesh is of {self.view.device.type} devices (in {self.name})"
                )
            if hasattr(tensor, "to_local"):
                raise ShapeError(f"{name} is a DTensor: pass its local shard, tensor.to_local() (in {self.name})")
        if self.reduce_dtype is not None and self.reduce_dtype.itemsize < first.dtype.itemsize:
            raise ShapeError(
                f"reduce_dtype {self.reduce_dtype} is narrower than {first.dtype} of {names[0]}: sums would lose "
                f"what is there (in {self.name})"
            )
        if first.dtype.is_complex:
            raise ShapeError(f"{names[0]} is {first.dtype}: complex products are not supported (in {self.name})")

    def _moved(self, tensors: Sequence[Tensor]) -> dict[str, set[str]]:
        """For each axis that this call, or a backward of it, communicates along: the letters of what moves there.

        A backward counts with every gradient if any is wanted: ranks that want different ones are to be told so.
        """
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        every: set[Role] = {"first", "second", "bias"}
        needs = [every if wanted and biased else every - {"bias"} if wanted else set() for biased in self.biased]
        moved: dict[str, set[str]] = {}
        for phase in (*forward_phases(self.plans, self.biased), *backward_phases(self.plans, needs, self.keep)):
            for move in (*phase.reduce, *(move for read in phase.reads for move in read.moves)):
                if move.kind != "slice":
                    moved.setdefault(move.axis, set()).update(dim.letter for dim in move.before)
        return {axis: moved[axis] for axis in self.axes if axis in moved}

    def _described(self, axis: str, letters: set[str], sizes: Sizes, tensors: Sequence[Tensor]) -> str:
        """What the ranks of an axis must agree on; of sizes, those of what moves along it, uncut by the axis itself."""
        lines = [f"layout {layout}{' with bias' if b else ''}" for layout, b in zip(self.layouts, self.biased)]
        lines.append(str(self.operation))
        lines += [f"dtype {tensors[0].dtype}", f"reduce_dtype {self.reduce_dtype}", f"kept {sorted(self.keep)}"]
        names = [self.layouts[0].first.name, *(layout.second.name for layout in self.layouts)]
        names += [layout.bias.name for layout, biased in zip(self.layouts, self.biased) if biased]
        wanted = [name for name, tensor in zip(names, tensors) if torch.is_grad_enabled() and tensor.requires_grad]
        lines += [f"gradients wanted of {', '.join(wanted) or 'nothing'}"]
        for (letter, axes), size in sorted(sizes.known.items()):
            if axis not in axes and letter in letters:
                lines.append(f"{'/'.join((letter, *axes))} = {size}")
        return "\n".join(lines)

    def _check_backward(self, dys: Sequence[Tensor | None]) -> None:
        """Do the ranks ask for the same gradients of the same kind?"""
        lines = ["backward", *(f"layout {layout}" for layout in self.layouts)]
        for layout, dy in zip(self.layouts, dys):
            lines.append(f"d{layout.product.name} {'is None' if dy is None else dy.dtype}")
        for name in self.axes:
            agree(self.view, self.view.axes[name], lambda: "\n".join(lines), "the backward of a product")
