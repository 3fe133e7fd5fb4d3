"""Products that share their first operand, bound to a mesh: whatever does not change between calls, decided once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shardgrad.comm.agree import agree, checking_every_call
from shardgrad.comm.mesh import MeshView
from shardgrad.errors import ShapeError
from shardgrad.layout.layout import Layout
from shardgrad.layout.plan import Move, Phase, Plan, Role, backward_phases, forward_phases, shares
from shardgrad.layout.sizes import Sizes
from shardgrad.ops import sizing
from shardgrad.ops.contract import Contraction
from shardgrad.ops.route import Step, Transit, steps

Key = tuple[Role, int]
Route = tuple[Step, ...]
_MOST_SHAPES = 512  # shapes remembered for a product; more than a training run has, fewer than memory minds


class Product:
    """One or more products of one input, on one mesh, with one choice of bias, kept operands and reduction dtype."""

    def __init__(
        self,
        layouts: tuple[Layout, ...],
        biased: tuple[bool, ...],
        view: MeshView,
        keep: frozenset[Key],
        reduce_dtype: torch.dtype | None,
    ) -> None:
        self.layouts, self.biased, self.view = layouts, biased, view
        self.keep, self.reduce_dtype = keep, reduce_dtype
        self.name = "; ".join(map(str, layouts))
        self.axes = tuple(dict.fromkeys(axis for layout in layouts for axis in layout.axes))
        view.require(self.axes, self.name)
        self.plans: tuple[Plan, ...] = tuple(layout.plan for layout in layouts)
        self.forward = forward_phases(self.plans, biased)
        self.share = shares(self.plans)
        self.terms = [_Terms(layout, view) for layout in layouts]
        self._backward: dict[tuple[frozenset[Role], ...], list[Stage]] = {}
        self._sized: dict[object, Sized] = {}

    def sized(self, tensors: Sequence[Tensor], given: Mapping[str, int] | None) -> Sized:
        """What follows from the shapes, dtypes and flags of a call; remembered unless sizes must be exchanged.

        tensors: the input, the weights, the biases that are there.
        """
        key = (
            tuple([(t.shape, t.dtype, t.requires_grad) for t in tensors]),
            torch.is_grad_enabled(),
            tuple(given.items()) if given else None,
        )
        found = self._sized.get(key)
        if found is not None and not checking_every_call():
            return found
        made, exchanged = self._size(tensors, given)
        if not exchanged:
            if len(self._sized) >= _MOST_SHAPES:
                self._sized.clear()
            self._sized[key] = made
        return made

    def _size(self, tensors: Sequence[Tensor], given: Mapping[str, int] | None) -> tuple[Sized, bool]:
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
        sizes = sizing.learn(specs, values, given, self.view, self.name)
        for name in self.axes:
            agree(self.view, self.view.axes[name], partial(self._described, name, sizes, tensors), "a product")
        missing = sizing.unknown(self._gathering(), sizes)
        if missing:
            sizing.exchange(missing, sizes, self.view, self.name)
        return Sized(self, sizes, tensors[0].dtype), bool(missing)

    def _gathering(self) -> list[Move]:
        moves: list[Move] = []
        for plan, biased in zip(self.plans, self.biased):
            moves += [move for route in plan.gather.values() for move in route]
            if biased:
                moves += [*plan.bias, *plan.bias_grad, *plan.bias_grad_gathered]
        return moves

    def __deepcopy__(self, memo: object) -> Product:
        return self  # bound to process groups, and never changed by a call

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
        if first.dtype.is_complex:
            raise ShapeError(f"{names[0]} is {first.dtype}: complex products are not supported (in {self.name})")

    def _described(self, axis: str, sizes: Sizes, tensors: Sequence[Tensor]) -> str:
        """What the ranks of an axis must agree on: everything but the sizes of what the axis itself cuts."""
        lines = [f"layout {layout}{' with bias' if b else ''}" for layout, b in zip(self.layouts, self.biased)]
        lines += [f"dtype {tensors[0].dtype}", f"reduce_dtype {self.reduce_dtype}", f"keep {sorted(self.keep)}"]
        lines += [f"gradients for {[t.requires_grad for t in tensors]}, enabled {torch.is_grad_enabled()}"]
        for (letter, axes), size in sorted(sizes.known.items()):
            if axis not in axes:
                lines.append(f"{'/'.join((letter, *axes))} = {size}")
        return "\n".join(lines)

    def check_backward(self, dys: Sequence[Tensor | None]) -> None:
        """While checking every call: do the ranks ask for the same gradients of the same kind?"""
        if not checking_every_call():
            return
        lines = [f"layout {layout}" for layout in self.layouts]
        lines += [
            f"d{layout.product.name} {'is None' if dy is None else dy.dtype}" for layout, dy in zip(self.layouts, dys)
        ]
        for name in self.axes:
            agree(self.view, self.view.axes[name], lambda: "backward\n" + "\n".join(lines), "the backward of a product")

    def stages(self, needs: tuple[frozenset[Role], ...]) -> list[Stage]:
        """Backward for the gradients that each product needs, with what is no longer read after each phase."""
        found = self._backward.get(needs)
        if found is None:
            phases = backward_phases(self.plans, needs, self.keep)
            found = []
            for at, phase in enumerate(phases):
                later = {(read.role, read.index) for other in phases[at + 1 :] for read in other.reads}
                done = tuple({(read.role, read.index) for read in phase.reads} - later)
                found.append(Stage(phase, done))
            self._backward[needs] = found
        return found


@dataclass(frozen=True, slots=True)
class Stage:
    """A phase of backward, and the operands that no later phase reads."""

    phase: Phase
    done: tuple[Key, ...]


class _Terms:
    """The local mathematics of one layout: the product, its two transposes, and how a bias lies in it."""

    def __init__(self, layout: Layout, view: MeshView) -> None:
        x, w, y = layout.first.letters, layout.second.letters, layout.product.letters
        self.product = Contraction(x, w, y)
        self.grad_first = Contraction(y, w, x)
        self.grad_second = Contraction(y, x, w)
        b = layout.bias.letters
        self._permute = tuple(b.index(letter) for letter in y if letter in b)
        self._permute_back = tuple([letter for letter in y if letter in b].index(letter) for letter in b)
        self._ones = tuple(at for at, letter in enumerate(y) if letter not in b)
        # A sum that is left to the caller is made of one term a rank: only one of them may hold the bias.
        self.adds_bias = all(view.coordinate[axis] == 0 for axis in layout.product.partial)

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        """y plus the bias, in place: y is a fresh local product."""
        if not self.adds_bias:
            return y
        bias = bias.permute(self._permute)
        for at in self._ones:
            bias = bias.unsqueeze(at)
        return y.add_(bias)

    def grad_bias(self, dy: Tensor) -> Tensor:
        """dY summed over the letters that the bias lacks, in the bias's order; a tensor of its own."""
        db = dy.sum(self._ones) if self._ones else dy.clone()
        return db.permute(self._permute_back)


class Sized:
    """A product with its sizes known: every route as concrete steps."""

    __slots__ = ("_dtype", "_made", "_product", "sizes")

    def __init__(self, product: Product, sizes: Sizes, dtype: torch.dtype) -> None:
        self._product, self.sizes, self._dtype = product, sizes, dtype
        self._made: dict[tuple[int, str], Route] = {}

    def route(self, moves: tuple[Move, ...], name: str) -> Route:
        """The steps of one of the plan's routes."""
        if not moves:
            return ()
        key = (id(moves), name)  # the plan keeps its moves alive
        found = self._made.get(key)
        if found is None:
            product = self._product
            found = steps(moves, name, product.view, self.sizes, product.reduce_dtype, self._dtype)
            self._made[key] = found
        return found


def run_forward(
    product: Product, sized: Sized, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[list[Tensor], dict[Key, Tensor]]:
    """Y of every product, and the operands as gathered that are to be kept for backward."""
    arriving: dict[Key, Transit] = {}
    for phase in product.forward:
        for read in phase.reads:
            key = (read.role, read.index)
            if key not in arriving:
                source = x if read.role == "first" else weights[read.index] if read.role == "second" else None
                if source is None:
                    source = biases[read.index]
                    assert source is not None
                name = product.plans[read.index].names[read.role]
                arriving[key] = Transit(source, sized.route(read.moves, name))
    leaving = []
    for phase in product.forward:
        at = phase.index
        left, right = (arriving[read.role, read.index].result() for read in phase.reads[:2])
        y = product.terms[at].product(left, right)
        leaving.append(Transit(y, sized.route(phase.reduce, product.plans[at].names["product"])))
    ys = []
    for at, transit in enumerate(leaving):
        y = transit.result()
        if product.biased[at]:
            y = product.terms[at].add_bias(y, arriving["bias", at].result())
        ys.append(y)
    return ys, {key: arriving[key].result() for key in product.keep}


def run_backward(
    product: Product,
    sized: Sized,
    operands: Mapping[Key, Tensor],
    dys: Sequence[Tensor | None],
    needs: Sequence[Collection[Role]],
) -> dict[Key, Tensor]:
    """The gradients needed, by role and product. `operands` holds what forward saved.

    The next phase's gathers are under way while a phase computes, and its reduction while the later ones do.
    """
    stages = product.stages(tuple(frozenset(need) if dy is not None else frozenset() for need, dy in zip(needs, dys)))
    arriving: dict[Key, Transit] = {}

    def start(phase: Phase) -> None:
        for read in phase.reads:
            key = (read.role, read.index)
            if key not in arriving:
                tensor = dys[read.index] if read.role == "product" else operands[key]
                assert tensor is not None
                name = product.plans[read.index].names[read.role]
                arriving[key] = Transit(tensor, sized.route(read.moves, f"d{name}" if read.role == "product" else name))

    leaving: dict[Key, list[Transit]] = {}
    for at, stage in enumerate(stages):
        for ahead in stages[at : at + 2]:
            start(ahead.phase)
        phase = stage.phase
        made = _made(product, phase, arriving, dys, needs)
        name = "db" if phase.made == "bias" else phase.name
        where: Key = (phase.made, 0 if phase.made == "first" else phase.index)
        leaving.setdefault(where, []).append(Transit(made, sized.route(phase.reduce, name)))
        for key in stage.done:
            arriving.pop(key, None)
    grads = {}
    for key, transits in leaving.items():
        total = transits[0].result()
        for transit in transits[1:]:
            total = total + transit.result()
        grads[key] = total
    return grads


def _made(
    product: Product,
    phase: Phase,
    arriving: Mapping[Key, Transit],
    dys: Sequence[Tensor | None],
    needs: Sequence[Collection[Role]],
) -> Tensor:
    """The local part of a phase: the products of its reads in pairs, summed; or the sum that is db."""
    if phase.made == "bias":
        at = phase.index
        gathered = product.plans[at].bias_reads_gathered(needs[at])
        dy = arriving["product", at].result() if gathered else dys[at]
        assert dy is not None
        return product.terms[at].grad_bias(dy)
    made: Tensor | None = None
    for dy_read, operand_read in zip(phase.reads[::2], phase.reads[1::2]):
        terms = product.terms[dy_read.index]
        dy = arriving["product", dy_read.index].result()
        operand = arriving[operand_read.role, operand_read.index].result()
        contraction = terms.grad_first if phase.made == "first" else terms.grad_second
        made = contraction(dy, operand, into=made)
    assert made is not None
    return made
