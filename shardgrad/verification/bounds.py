"""Whether a tensor of a sharded product is right: every element against float64, within what roundings can reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isinf, isnan, log, prod, sqrt

import torch
from torch import Tensor

from shardgrad.arguments import told
from shardgrad.errors import ShapeError
from shardgrad.layout.layout import Layout
from shardgrad.verification import oracle
from shardgrad.verification.arithmetic import MADE, Local, computed, local, local_sum
from shardgrad.verification.intervals import DIGITS, hull, interval, rounded
from shardgrad.verification.oracle import Right
from shardgrad.verification.reach import Bias, reach

CHANCE = 1e-6
"""With what probability an element of a right tensor may lie outside of the likely bound."""


@dataclass(frozen=True, slots=True)
class Worst:
    """The element of a tensor that lies worst within (ratio <= 1) or outside of its bound.

    ratio: |observed - exact| / bound, of an element that is within it; outside, 1 + the distance from what is
        allowed, over the bound. 0 for an exact element, inf for NaN, for any error where the bound is zero, and for a
        tensor that cannot be compared at all (`problem` says why).
    lower, upper: what is allowed; bound: how far from the exact value that is, on the farther side.
    index: of the element in the global tensor; rank: that holds it (None where the caller's tensor is global).
    likely: the largest ratio to the probabilistic bound of all elements; suspect: the element that has it.
    lam: the probabilistic bound's λ: a right tensor has an element outside with a probability of at most `CHANCE`.
    overflow: elements that are not finite where the arithmetic alone may have left the dtype's range. They fail, but
        speak against the data's scale, not against the code.
    """

    tensor: str
    ratio: float
    index: tuple[int, ...] = ()
    rank: int | None = None
    observed: float = 0.0
    exact: float = 0.0
    lower: float = 0.0
    upper: float = 0.0
    likely: float = 0.0
    suspect: tuple[int, ...] = ()
    lam: float = 0.0
    overflow: int = 0
    problem: str = ""

    @property
    def ok(self) -> bool:
        return self.ratio <= 1

    @property
    def suspicious(self) -> bool:
        """Within the proved bound, but outside of the likely one."""
        return self.ok and self.likely > 1

    @property
    def bound(self) -> float:
        return max(abs(self.exact - self.lower), abs(self.upper - self.exact))

    def __str__(self) -> str:
        if self.problem:
            return f"{self.tensor}: {self.problem}" + (f" on rank {self.rank}" if self.rank is not None else "")
        where = _element(self.tensor, self.index) + (f" on rank {self.rank}" if self.rank is not None else "")
        if self.overflow:
            return (
                f"{where} is {self.observed}, as are {self.overflow} elements where |X||W| leaves the range of the "
                f"dtype: overflow; scale the operands (exact: {self.exact:.6g})"
            )
        said = (
            f"{where} is {self.observed:.9g}, exact {self.exact:.9g}: {abs(self.observed - self.exact):.3g} off, "
            f"{self.ratio:.3g} of the bound {self.bound:.3g}"
        )
        if not self.ok:
            return f"{said}; roundings reach {self.lower:.9g} to {self.upper:.9g}"
        said += f", {self.likely:.3g} of the likely one"
        if self.suspicious:
            said += (
                f" at {_element(self.tensor, self.suspect)}: SUSPICIOUS, roundings with mean zero do that in less than "
                f"{CHANCE:.0e} of all tensors (λ = {self.lam:.1f})"
            )
        return said


@dataclass(frozen=True, slots=True)
class Power:
    """The smallest errors that a check sees, in a right tensor that is as near to the exact one as its dtype can be.

    ulp: the share of elements in which an error of one ulp (the spacing of the dtype's numbers there), up or down,
        is seen. median: half of the elements show every error of more than so many ulps. largest: every element shows
        every error of more than this, in units of the tensor's root mean square.
    """

    ulp: float
    median: float
    largest: float

    def __str__(self) -> str:
        return (
            f"sees one ulp in {self.ulp:.0%} of the elements, more than {self.median:.2g} ulps in half of them, "
            f"{self.largest:.2g} of the root mean square in all"
        )


@dataclass(frozen=True, slots=True)
class Bounded:
    """What a tensor must be, element by element. All global, float64.

    lower, upper: what a right computation may reach, [1 or 2, …]: for certain and, where that is less, likely.
    lam: of the likely ones. dtype: of the tensor.
    largest: the magnitude that a partial sum or the result may reach.
    limit: the largest finite number of the narrowest dtype on the way.
    """

    exact: Tensor
    lower: Tensor
    upper: Tensor
    lam: float
    dtype: torch.dtype
    largest: Tensor
    limit: float

    @property
    def bound(self) -> Tensor:
        """How far a right computation may be from the exact value, on the farther side."""
        return _farther(self.exact, self.lower[0], self.upper[0])

    def narrow(self, dim: int, start: int, length: int) -> Bounded:
        """Of a part of the tensor."""
        exact, largest = (t.narrow(dim, start, length) for t in (self.exact, self.largest))
        lower, upper = (t.narrow(1 + dim, start, length) for t in (self.lower, self.upper))
        return Bounded(exact, lower, upper, self.lam, self.dtype, largest, self.limit)

    def power(self) -> Power:
        """What errors the certain bound shows; of an empty tensor, all."""
        if not self.exact.numel():
            return Power(1.0, 0.0, 0.0)
        lower, upper = self.lower[0], self.upper[0]
        near = rounded(self.exact, self.dtype).clamp(lower, upper)
        info = torch.finfo(self.dtype)
        exponent = torch.frexp(near)[1] - DIGITS[self.dtype]
        ulp = torch.ldexp(torch.ones_like(near), exponent).clamp(min=info.smallest_normal * info.eps)
        up, down = upper - near, near - lower
        unseen = torch.maximum(up, down)
        seen = ((up < ulp).double() + (down < ulp).double()).mean() / 2
        size = float(self.exact.square().mean().sqrt())
        most = float(unseen.max())
        return Power(float(seen), float((unseen / ulp).median()), most / size if size else inf if most else 0.0)


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
    all_rounded: bool = False,
) -> Bounded:
    """The exact value of one tensor of a layout, and what a right computation may make of it.

    Args:
        left, right: global operands of what is made, in the dtype of the computation: X and W for Y, dY and W for dX,
            dY and X for dW, dY and None for db.
        made: Y, dX, dW or db.
        mesh_shape: ranks along each axis; axes that are missing have one.
        bias: the global bias, added to Y.
        reduce_dtype: in which partial sums are reduced, as of `matmul`.
        exact: nothing but the exact value is allowed: for small integers, whose partial sums the dtype holds.
        all_rounded: every partial sum is rounded to the dtype, as `matmul` does it; else it may be, or not.

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
    ways = computed(layout, made, {**dict.fromkeys(layout.letters, 1), **sizes}, shape)
    other, others = (
        (right, second.letters)
        if right is not None and second is not None
        else oracle.ones(left, first.letters, target.letters)
    )
    letters = (first.letters, others, target.letters)
    dtype, wire = left.dtype, reduce_dtype or left.dtype
    how = local_sum(dtype) if second is None else local(dtype, left.device.type)
    every = [oracle.parts(left, other, letters, what.blocks) for what in ways]
    whole = oracle.total(every[0])
    added = None if bias is None or made != "Y" else _like(bias.double(), layout.bias.letters, y.letters)
    value = whole.value if added is None else _with(whole, added).value
    # Where all that follows is rounded to float32 or less, float32 is enough, and faster.
    narrow = all_rounded and torch.float64 not in (dtype, wire) and not any(any(what.left) for what in ways)
    held = torch.float32 if narrow else torch.float64
    errors = _Errors(how, left, right, None if added is None else bias, value.numel() * len(every[0]), held)
    rounds = 1 + 2.0 ** -DIGITS[dtype] * (1 + len(every[0]))
    largest = errors.largest(whole if added is None else _with(whole, added)) * rounds
    limit = min(torch.finfo(d).max for d in (dtype, wire))
    if exact:
        return Bounded(value, value[None], value[None], errors.lam, dtype, largest, limit)
    reached = []
    for what, parts in zip(ways, every):
        reduced, rest = any(what.reduced), any(what.left)
        biased = None
        if added is not None:  # it may be one more term of a partial sum that nothing reduces
            terms = parts if rest or not reduced else []
            inside = [errors.interval(_with(part, added), with_bias=True) for part in terms]
            biased = Bias(added.expand_as(value).to(held), inside)
        partial = [errors.interval(part) for part in parts]
        reached.append(reach(partial, biased, dtype, wire if reduced else None, rest, all_rounded))
    ends = hull(reached).double()
    if isnan(float(ends.sum())):  # where sums overflow, nothing is known
        ends = torch.where(ends.isnan(), -inf, ends)
    return Bounded(value, ends[:, 0], -ends[:, 1], errors.lam, dtype, largest, limit)


class _Errors:
    """How far partial sums may be from their exact values in the accumulator of one device.

    right: None for a sum of `left`'s elements. lam: of the likely errors. held: the dtype that holds what follows.
    """

    def __init__(
        self, how: Local, left: Tensor, right: Tensor | None, bias: Tensor | None, count: int, held: torch.dtype
    ) -> None:
        self.how, self.held = how, held
        self.wide = torch.float64 if left.dtype == torch.float64 else torch.float32
        self.lam = sqrt(2 * log(2 * max(count, 1) / CHANCE))
        tops = [float(t.abs().max()) if t.numel() else 0.0 for t in (left, right) if t is not None]
        self.top, self.tops = prod(tops), sum(tops)
        steps = [oracle.step(t) for t in (left, right) if t is not None]
        # Every term is a multiple of the step, and the accumulator holds all multiples of it up to this.
        self.exact = 0.0 if how.operand or how.spilled else prod(steps) / how.accumulate
        self.exact_with_bias = 0.0 if bias is None else min(self.exact, oracle.step(bias) / how.accumulate)

    def interval(self, part: Right, *, with_bias: bool = False) -> Tensor:
        """What a partial sum may be before its last rounding."""
        value, magnitude = part.value, self._magnitude(part)
        own = part.error + value.abs() * 2.0**-53 + self._underflow(part.terms)
        errors = [error.add_(own) for error in self.how.errors(part.terms, value, magnitude, self.top, self.lam)]
        exact = self.exact_with_bias if with_bias else self.exact
        if magnitude.numel() and float(magnitude.min()) <= exact:  # then no sum of any of the terms is rounded
            errors = [torch.where(magnitude <= exact, self._underflow(part.terms), error) for error in errors]
        return interval(value, errors, self.held)

    def largest(self, whole: Right) -> Tensor:
        """The magnitude that a partial sum may reach."""
        one = whole.magnitude.new_ones(())
        grown = 1 + float(self.how.errors(whole.terms, one, one, 1.0, self.lam)[0])
        return self._magnitude(whole) * grown + self._underflow(whole.terms)

    def _magnitude(self, part: Right) -> Tensor:
        """With the errors of the float64 in which it, and bounds, are computed."""
        return part.magnitude * (1 + (part.terms + 64) * 2.0**-52)

    def _underflow(self, terms: int) -> float:
        """What relative errors do not see: operands and products too small, each taken for zero."""
        return terms * torch.finfo(self.wide).smallest_normal * (1 + self.tops)


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
    right_ = bounded(left, right, layout, made, mesh_shape, bias=bias, reduce_dtype=reduce_dtype, exact=exact)
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
    certain = _ratio(found, right, 0)
    likely = certain if len(right.lower) == 1 else _ratio(found, right, 1)
    at, suspect = int(certain.argmax()), int(likely.argmax())
    over = int((~found.isfinite() & (right.largest > right.limit)).sum()) if isinf(float(certain.flatten()[at])) else 0

    def place(flat: int) -> tuple[int, ...]:
        index = torch.unravel_index(torch.tensor(flat), found.shape)
        return tuple(int(i) + offset for i, offset in zip(index, start or (0,) * found.dim()))

    here = (found, right.exact, right.lower[0], right.upper[0])
    seen, exact, lower, upper = (float(t.flatten()[at]) for t in here)
    ratio, odd = float(certain.flatten()[at]), float(likely.flatten()[suspect])
    return Worst(name, ratio, place(at), rank, seen, exact, lower, upper, odd, place(suspect), right.lam, over)


def _ratio(found: Tensor, right: Bounded, which: int) -> Tensor:
    """|error| / bound of each element: at most 1 within what is allowed, and more outside."""
    lower, upper = right.lower[which], right.upper[which]
    bound = _farther(right.exact, lower, upper)
    outside = torch.maximum(lower - found, found - upper).clamp(min=0)
    error = torch.where(outside > 0, bound + outside, (found - right.exact).abs())
    ratio = torch.where(error == 0, 0.0, error / bound)
    # The rounding of the division itself makes nothing right, and nothing wrong.
    ratio = torch.where(outside > 0, ratio.clamp(min=1 + 2.0**-40), ratio.clamp(max=1))
    return torch.where(found.isfinite() & ~ratio.isnan(), ratio, inf)


def _farther(exact: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.maximum((exact - lower).abs(), (upper - exact).abs())


def _element(tensor: str, index: tuple[int, ...]) -> str:
    return f"{tensor}[{', '.join(map(str, index))}]"


def _with(part: Right, bias: Tensor) -> Right:
    """The bias as one more term."""
    value, carried = oracle.two_sum(part.value, bias.expand_as(part.value))
    value = value + carried
    return Right(value, part.magnitude + bias.abs(), part.error + value.abs() * 2.0**-53, part.terms + 1)


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
