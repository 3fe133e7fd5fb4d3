"""`check_product`: one product on the ranks of a mesh, every element of Y, dX, dW and db within its bound."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm.adjoint import all_reduce
from shardgrad.comm.collectives import gather_ints
from shardgrad.comm.mesh import MeshView, view
from shardgrad.comm.pieces import exact as pieces_of
from shardgrad.errors import VerificationError
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import TensorSpec
from shardgrad.layout.sizes import slab
from shardgrad.ops.contract import Contraction
from shardgrad.ops.matmul import matmul
from shardgrad.ops.shard import shard
from shardgrad.verification import oracle
from shardgrad.verification.bounds import Bounded, Power, Worst, bounded, compare
from shardgrad.verification.intervals import DIGITS

Data = Literal["normal", "positive", "wide"]


@dataclass(frozen=True, slots=True, repr=False)
class ProductCheck:
    """What `check_product` found, alike on every rank of the mesh.

    worst: the worst element of each tensor; power: the smallest errors that would have been seen in it.
    """

    layout: str
    sizes: Mapping[str, int]
    dtype: torch.dtype
    exact: bool
    worst: Mapping[str, Worst]
    power: Mapping[str, Power]

    @property
    def ok(self) -> bool:
        return all(worst.ok for worst in self.worst.values())

    @property
    def ratio(self) -> float:
        """The largest |error| / bound of all elements; at most 1 if all is right."""
        return max(worst.ratio for worst in self.worst.values())

    @property
    def suspicious(self) -> bool:
        """Whether all is within the proved bounds, but something outside of a likely one."""
        return self.ok and any(worst.suspicious for worst in self.worst.values())

    def require(self) -> ProductCheck:
        """Itself, if all is right.

        Raises:
            VerificationError: an element is outside of its bound.
        """
        if not self.ok:
            raise VerificationError(str(self))
        return self

    def __str__(self) -> str:
        how = "exactly" if self.exact else "within the bound of the arithmetic"
        sizes = ", ".join(f"{letter}={size}" for letter, size in self.sizes.items())
        said = "every element right" if self.ok else "WRONG"
        head = f"{self.layout} in {str(self.dtype).removeprefix('torch.')} ({sizes}): {said}, {how}"
        lines = [head]
        for name, worst in self.worst.items():
            lines.append(f"  {'?' if worst.suspicious else ' ' if worst.ok else '!'} {worst}")
            lines.append(f"      {self.power[name]}")
        return "\n".join(lines)

    __repr__ = __str__


@told
def check_product(
    layout: Layout | str,
    sizes: Mapping[str, int],
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool | None = None,
    reduce_dtype: torch.dtype | None = None,
    save_gathered: Collection[str] = (),
    exact: bool = False,
    data: Data = "normal",
    seed: int = 0,
) -> ProductCheck:
    """Run `matmul` forward and backward on random operands, and compare every element of every rank with one device.

    Each shard of Y, dX, dW and db, on each rank that holds it, is compared with the float64 result (for float64, with
    twice its precision), element by element, within a bound derived from the roundings of this dtype, these sizes and
    this number of ranks. Called on every rank of the mesh.

        check = sg.check_product("X[n,d/tp] W[d/tp,m] -> Y[n,m]", {"n": 5, "d": 7, "m": 3}, mesh, dtype=torch.bfloat16)
        print(check.require())

    Args:
        layout, mesh, reduce_dtype, save_gathered: as of `matmul`.
        sizes: the global size of every letter.
        dtype: float64, float32, bfloat16 or float16.
        bias: whether a bias is added; by default, whether the layout writes one.
        exact: operands are small integers, thinned out until every partial sum is a number of the dtype (and of
            `reduce_dtype`); results must be equal.
        data: what operands are else: normal numbers; "positive" ones, uniform in [0, 1], where nothing cancels and
            rounding errors are largest beside the bound; or "wide", normal numbers times 2^-30 to 2^0, which reach
            below what fp16 holds.
        seed: of the operands.

    Raises:
        LayoutError, MeshError: as of `matmul`.
        ValueError: a dtype without a bound.
    """
    layout = Layout(layout) if isinstance(layout, str) else layout
    if dtype not in DIGITS or (reduce_dtype or dtype) not in DIGITS:
        known = ", ".join(str(d).removeprefix("torch.") for d in DIGITS)
        raise ValueError(f"dtype and reduce_dtype must be among {known}, not {dtype} and {reduce_dtype}")
    mesh_view = view(mesh)
    layout.resolve(sizes, mesh_view.shape)
    biased = layout.has_bias if bias is None else bias
    full = operands(layout, sizes, dtype, exact, seed, biased, reduce_dtype, data)
    x, w, b, dy = (t.to(mesh_view.device) for t in full)
    local = [shard(t, spec, mesh).requires_grad_() for t, spec in zip((x, w, b), (layout.lhs, layout.rhs, layout.bias))]
    y = matmul(
        local[0],
        local[1],
        layout,
        mesh,
        local[2] if biased else None,
        sizes,
        save_gathered=save_gathered,
        reduce_dtype=reduce_dtype,
    )
    y.backward(shard(dy, layout.out, mesh))
    observed: dict[str, tuple[Tensor | None, TensorSpec, Bounded]] = {}

    def right(made: str, left: Tensor, other: Tensor | None, added: Tensor | None = None) -> Bounded:
        return bounded(
            left,
            other,
            layout,
            made,
            pieces_of(mesh_view) or mesh_view.shape,  # exact mode rounds as one rank for each piece would
            bias=added,
            reduce_dtype=reduce_dtype,
            exact=exact,
            all_rounded=True,
        )

    observed["Y"] = y, layout.out, right("Y", x, w, b if biased else None)
    observed["dX"] = local[0].grad, layout.lhs.grad, right("dX", dy, w)
    observed["dW"] = local[1].grad, layout.rhs.grad, right("dW", dy, x)
    if biased:
        observed["db"] = local[2].grad, layout.bias.grad, right("db", dy, None)
    worst = {name: compare_shards(name, *parts, dtype, mesh) for name, parts in observed.items()}
    power = {name: right.power() for name, (_, _, right) in observed.items()}
    return ProductCheck(str(layout), dict(sizes), dtype, exact, worst, power)


def compare_shards(
    name: str, local: Tensor | None, spec: TensorSpec, right: Bounded, dtype: torch.dtype, mesh: DeviceMesh
) -> Worst:
    """The worst element of a tensor over all of its shards and replicas, alike on every rank of the mesh.

    A tensor that is one term of a sum over some axes (`spec.partial`) is summed over them first, in float64.
    """
    mesh_view = view(mesh)
    starts, here = [], right
    for at, (size, dim) in enumerate(zip(right.exact.shape, spec.dims)):
        start, length = slab(size, dim.axes, mesh_view.shape, mesh_view.coordinate)
        starts.append(start)
        here = here.narrow(at, start, length)
    worst = compare(name, local, here, dtype, tuple(starts), mesh.get_rank())
    if spec.partial:
        # Every rank takes part, also one whose tensor does not fit.
        term = torch.zeros_like(here.exact) if local is None or worst.problem else local.detach().double()
        for axis in spec.partial:
            term = all_reduce(term, mesh, axis)
        if not worst.problem:
            worst = compare(name, term, here, torch.float64, tuple(starts), mesh.get_rank())
    return _worst_of_all(worst, len(starts), mesh_view)


def operands(
    layout: Layout,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    exact: bool,
    seed: int,
    biased: bool = True,
    reduce_dtype: torch.dtype | None = None,
    data: Data = "normal",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Global X, W, B and dY, alike on every rank: as `data` says, or integers whose sums the dtype holds."""
    generator = torch.Generator().manual_seed(seed)
    specs = (layout.lhs, layout.rhs, layout.bias, layout.out)
    shapes = [[sizes[letter] for letter in spec.letters] for spec in specs]
    if not exact:
        x, w, b, dy = (_numbers(shape, data, generator).to(dtype) for shape in shapes)
        return x, w, b, dy
    digits = min(DIGITS[dtype], DIGITS[reduce_dtype or dtype], DIGITS[torch.float32] if dtype != torch.float64 else 53)
    largest, share = 8, 1.0
    while True:
        drawn = [_integers(shape, largest, share, generator) for shape in shapes]
        tops = [_top(layout, made, drawn, biased) for made in ("Y", "dX", "dW", "db")]
        if max(tops) <= 2**digits:
            x, w, b, dy = (t.to(dtype) for t in drawn)
            return x, w, b, dy
        if largest > 1:
            largest //= 2
        else:
            share *= 0.7


def _numbers(shape: list[int], data: Data, generator: torch.Generator) -> Tensor:
    if data == "positive":
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values * torch.exp2(-30 * torch.rand(shape, generator=generator).double()) if data == "wide" else values


def _integers(shape: list[int], largest: int, share: float, generator: torch.Generator) -> Tensor:
    values = torch.randint(-largest, largest + 1, shape, generator=generator).double()
    kept = torch.rand(shape, generator=generator) < share
    return torch.where(kept, values, 0.0)


def _top(layout: Layout, made: str, drawn: list[Tensor], biased: bool) -> float:
    """The largest |X||W|, which no partial sum exceeds."""
    x, w, b, dy = drawn
    first, second, out = layout.lhs.letters, layout.rhs.letters, layout.out.letters
    if made == "db":
        ones, summed = oracle.ones(dy, out, layout.bias.letters)
        left, other, letters = dy, ones, (out, summed, layout.bias.letters)
    else:
        left, other, letters = {
            "Y": (x, w, (first, second, out)),
            "dX": (dy, w, (out, second, first)),
            "dW": (dy, x, (out, first, second)),
        }[made]
    largest = Contraction(*letters)(left.abs(), other.abs())
    top = float(largest.max()) if largest.numel() else 0.0
    return top + float(b.abs().max()) if biased and made == "Y" and b.numel() else top


def _worst_of_all(worst: Worst, dims: int, mesh_view: MeshView) -> Worst:
    """Over all axes in turn, so that every rank of the mesh knows the same one."""
    for axis in mesh_view.axes.values():
        if axis.size > 1:
            rows = gather_ints(_encode(worst, dims), axis, mesh_view.device, "comparison of errors between ranks")
            found = [_decode(row, worst) for row in rows]
            odd = max(found, key=lambda one: one.likely)
            worst = max(found, key=lambda one: (one.ratio, bool(one.problem)))
            worst = replace(worst, likely=odd.likely, suspect=odd.suspect)
    return worst


def _encode(worst: Worst, dims: int) -> list[int]:
    numbers = (worst.ratio, worst.observed, worst.exact, worst.lower, worst.upper, worst.likely, worst.lam)
    bits = [struct.unpack("<q", struct.pack("<d", number))[0] for number in numbers]
    places = [*(worst.index or (-1,) * dims), *(worst.suspect or (-1,) * dims)]
    return [*bits, -1 if worst.rank is None else worst.rank, worst.overflow, int(bool(worst.problem)), *places]


def _decode(row: list[int], mine: Worst) -> Worst:
    numbers = [struct.unpack("<d", struct.pack("<q", bits))[0] for bits in row[:7]]
    rank, overflow, problem, *places = row[7:]
    dims = len(places) // 2
    index, suspect = (tuple(i for i in place if i >= 0) for place in (places[:dims], places[dims:]))
    ratio, observed, exact, lower, upper, likely, lam = numbers
    said = (mine.problem or "does not fit its layout, or is not there") if problem else ""
    return Worst(mine.tensor, ratio, index, rank, observed, exact, lower, upper, likely, suspect, lam, overflow, said)
