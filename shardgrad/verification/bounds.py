"""Whether a tensor of a sharded product is right: every element against float64, within the bound of its roundings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isinf

import torch
from torch import Tensor

from shardgrad.arguments import told
from shardgrad.errors import ShapeError
from shardgrad.layout.layout import Layout
from shardgrad.verification import oracle
from shardgrad.verification.arithmetic import DIGITS, MADE, Roundings, computed, least, unit


@dataclass(frozen=True, slots=True)
class Worst:
    """The element of a tensor that lies worst within (ratio <= 1) or outside of its bound.

    ratio: |observed - exact| / bound; 0 for an exact element, inf for NaN, for any error where the bound is zero, and
        for a tensor that cannot be compared at all (`problem` says why).
    index: of the element in the global tensor; rank: that holds it (None where the caller's tensor is global).
    overflow: elements that are not finite where the arithmetic alone may have left the dtype's range. They fail, but
        speak against the data's scale, not against the code.
    """

    tensor: str
    ratio: float
    index: tuple[int, ...] = ()
    rank: int | None = None
    observed: float = 0.0
    exact: float = 0.0
    bound: float = 0.0
    overflow: int = 0
    problem: str = ""

    @property
    def ok(self) -> bool:
        return self.ratio <= 1

    def __str__(self) -> str:
        if self.problem:
            return f"{self.tensor}: {self.problem}" + (f" on rank {self.rank}" if self.rank is not None else "")
        where = f"{self.tensor}[{', '.join(map(str, self.index))}]"
        where += f" on rank {self.rank}" if self.rank is not None else ""
        if self.overflow:
            return (
                f"{where} is {self.observed}, as are {self.overflow} elements where |X||W| leaves the range of the "
                f"dtype: overflow; scale the operands (exact: {self.exact:.6g})"
            )
        return (
            f"{where} is {self.observed:.9g}, exact {self.exact:.9g}: {abs(self.observed - self.exact):.3g} off, "
            f"{self.ratio:.3g} of the bound {self.bound:.3g}"
        )


@dataclass(frozen=True, slots=True)
class Bounded:
    """What a tensor must be, element by element. All global, float64.

    bound: on |observed - exact|; largest: the magnitude that a partial sum or the result may reach.
    limit: the largest finite number of the narrowest dtype on the way.
    """

    exact: Tensor
    bound: Tensor
    largest: Tensor
    limit: float


@torch.no_grad()
def bounded(
    left: Tensor,
    right: Tensor | None,
    layout: Layout | str,
    made: str = "Y",
    mesh_shape: Mapping[str, int] | None = None,
    *,
    bias: Tensor | None = None,
    reduce_dtype: torch.dtype | None = None,
    exact: bool = False,
    lam: float | None = None,
) -> Bounded:
    """The exact value of one tensor of a layout, and how far from it a right computation may be.

    Args:
        left, right: global operands of what is made, in the dtype of the computation: X and W for Y, dY and W for dX,
            dY and X for dW, dY and None for db.
        made: Y, dX, dW or db.
        mesh_shape: ranks along each axis; axes that are missing have one.
        bias: the global bias, added to Y.
        reduce_dtype: in which partial sums are reduced, as of `matmul`.
        exact: the bound is zero: for small integers, whose partial sums the dtype holds.
        lam: Higham and Mary's probabilistic bound with this λ instead, where it is sharper.

    Raises:
        ValueError: made is unknown, or an operand is missing.
        ShapeError: operands do not fit the layout, or are of a dtype without a bound.
    """
    layout = Layout(layout) if isinstance(layout, str) else layout
    x, w, y = layout.lhs, layout.rhs, layout.out
    specs = {"Y": (x, w, y), "dX": (y, w, x), "dW": (y, x, w), "db": (y, None, layout.bias)}
    if made not in specs:
        raise ValueError(f"made is one of {', '.join(MADE)}, not {made!r}")
    first, second, target = specs[made]
    if (second is None) != (right is None):
        needs = "one operand, dY" if second is None else f"two operands, {first.name} and {second.name}"
        raise ValueError(f"{made} is made of {needs}")
    sizes: dict[str, int] = {}
    for tensor, spec in ((left, first), (right, second), (bias if made == "Y" else None, layout.bias)):
        if tensor is not None and spec is not None:
            _learn(sizes, tensor, spec.name, spec.letters, left.dtype)
    # A letter that no operand has (db is made of dY alone) is in no sum here: its size does not matter.
    shape = {axis: (mesh_shape or {}).get(axis, 1) for axis in layout.axes}
    what = computed(layout, made, {**dict.fromkeys(layout.letters, 1), **sizes}, shape)
    other, others = (
        (right, second.letters)
        if right is not None and second is not None
        else oracle.ones(left, first.letters, target.letters)
    )
    letters = (first.letters, others, target.letters)
    value, magnitude, error = oracle.contract(left, other, letters, what.all_terms)
    dtype = left.dtype
    stages = what.stages(dtype, reduce_dtype, left.device.type)
    # Errors of the float64 in which bounds are computed are put on top of everything.
    safe = 1 + (what.all_terms + 64) * 2.0**-52
    magnitude = magnitude * safe
    added = None if bias is None or made != "Y" else _like(bias.double(), layout.bias.letters, y.letters)
    within = magnitude
    if added is not None and not any((*what.reduced, *what.left)):  # it may be one more term of the product's sum
        stages.inside.add(unit(torch.float32 if DIGITS[dtype] < DIGITS[torch.float32] else dtype))
        within = magnitude + added.abs()
    inside = stages.inside.relative(lam) * within
    partial = oracle.parts(left, other, letters, what.blocks) + error + inside
    exact_sum = value
    if added is not None:
        added = added.expand_as(value)
        magnitude = magnitude + added.abs()
        if any(what.left):  # one rank adds it before the caller sums
            stages.outside.add(unit(dtype))
            partial = partial + added.abs()
        value, carried = oracle.two_sum(value, added)
        value, error = value + carried, error + value.abs() * 2.0**-52
    bound = inside + stages.outside.relative(lam) * partial
    bound = bound + stages.last.relative(lam) * (exact_sum.abs() + error + bound)
    if added is not None and not any(what.left):
        bound = bound + unit(dtype) * (value.abs() + error + bound)
    # What relative errors do not see: operands and products too small, each at most as often as there are terms.
    wide = torch.float32 if DIGITS[dtype] < DIGITS[torch.float32] else dtype
    tops = [float(t.abs().max()) for t in (left, other) if t.numel()]
    absolute = what.all_terms * least(wide) * (1 + sum(tops))
    all_stages = (stages.inside, stages.outside, stages.last)
    absolute += sum(stage.absolute for stage in all_stages)
    grown = 1 + Roundings(sum(stage.log for stage in all_stages)).relative()
    bound = (bound + absolute * grown + error) * safe
    dtypes = (dtype,) if reduce_dtype is None else (dtype, reduce_dtype)
    limit = min(torch.finfo(d).max for d in dtypes)
    largest = magnitude * min(grown, 2.0) + absolute
    return Bounded(value, torch.zeros_like(bound) if exact else bound, largest, limit)


@told
@torch.no_grad()
def within_bound(
    observed: Tensor,
    left: Tensor,
    right: Tensor | None,
    layout: Layout | str,
    made: str = "Y",
    mesh_shape: Mapping[str, int] | None = None,
    *,
    bias: Tensor | None = None,
    reduce_dtype: torch.dtype | None = None,
    exact: bool = False,
    lam: float | None = None,
) -> Worst:
    """Whether a global tensor of your own, however it was computed, is within the bound of its arithmetic.

        y = x @ w                                   # fp32, bf16, fp16 or fp64
        assert sg.within_bound(y, x, w, "X[n,d] W[d,m] -> Y[n,m]").ok
        assert sg.within_bound(x.grad, dy, w, "X[n,d] W[d,m] -> Y[n,m]", "dX").ok

    Arguments and errors as of `bounded`: `layout` and `mesh_shape` say how many ranks' partial sums were added. No
    communication.

    Returns:
        The worst element. A shape or a dtype that differs is a failure, not an error.
    """
    right_ = bounded(left, right, layout, made, mesh_shape, bias=bias, reduce_dtype=reduce_dtype, exact=exact, lam=lam)
    return compare(made, observed, right_, left.dtype)


def compare(
    name: str,
    observed: Tensor | None,
    right: Bounded,
    dtype: torch.dtype,
    start: tuple[int, ...] = (),
    rank: int | None = None,
) -> Worst:
    """The worst element of a tensor (a shard that begins at `start`) against what it must be."""
    if observed is None:
        return Worst(name, inf, rank=rank, problem="there is none (None)")
    if observed.shape != right.exact.shape or observed.dtype != dtype:
        return Worst(
            name,
            inf,
            rank=rank,
            problem=f"{observed.dtype} of shape {tuple(observed.shape)} instead of {dtype} of shape "
            f"{tuple(right.exact.shape)}",
        )
    if observed.numel() == 0:
        return Worst(name, 0.0, rank=rank)
    found = observed.detach().double()
    error = (found - right.exact).abs()
    ratio = torch.where(error == 0, 0.0, error / right.bound).nan_to_num(inf, inf)
    at = int(ratio.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), ratio.shape))
    over = int((~found.isfinite() & (right.largest > right.limit)).sum()) if isinf(float(ratio.flatten()[at])) else 0
    place = tuple(i + offset for i, offset in zip(index, start or (0,) * len(index)))
    here = (float(t.flatten()[at]) for t in (ratio, found, right.exact, right.bound))
    worst, seen, exact, bound = here
    return Worst(name, worst, place, rank, seen, exact, bound, over)


def _learn(sizes: dict[str, int], tensor: Tensor, name: str, letters: tuple[str, ...], dtype: torch.dtype) -> None:
    if tensor.dtype not in DIGITS or tensor.dtype != dtype:
        known = ", ".join(str(d).removeprefix("torch.") for d in DIGITS)
        raise ShapeError(f"{name} is {tensor.dtype}: operands must be of one dtype, one of {known}")
    if tensor.dim() != len(letters):
        raise ShapeError(f"{name}[{','.join(letters)}] has {len(letters)} dims, got shape {tuple(tensor.shape)}")
    for letter, size in zip(letters, tensor.shape):
        if sizes.setdefault(letter, size) != size:
            raise ShapeError(f"letter {letter!r} is {sizes[letter]} in one tensor and {size} in {name}")


def _like(bias: Tensor, letters: tuple[str, ...], product: tuple[str, ...]) -> Tensor:
    """The bias as a tensor that broadcasts against the product."""
    bias = bias.permute([letters.index(letter) for letter in product if letter in letters])
    for at, letter in enumerate(product):
        if letter not in letters:
            bias = bias.unsqueeze(at)
    return bias
