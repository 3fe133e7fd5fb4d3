"""One tensor on one rank against float64, in units of what rounding does; and what all ranks found together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan
from typing import get_args

import torch
from torch import Tensor

from shardgrad.comm.mesh import MeshView
from shardgrad.verification import exchange
from shardgrad.verification.observed import Kind, Observed, Split
from shardgrad.verification.pairing import fit, local_part
from shardgrad.verification.record import Key
from shardgrad.verification.report import Row, Verdict
from shardgrad.verification.rounding import Bounds, InSingle, Spread, floor

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_MAY_BE_ZERO: tuple[Kind, ...] = ("output", "loss", "output gradient", "input gradient", "gradient", "norm")


@dataclass(frozen=True)
class Measured:
    """What this rank finds of one tensor.

    local, exact: this rank's tensor; the global one, float64; None where there is none.
    spread: what rounding does to it.
    wrong: which elements of the local tensor are beyond their bound.
    numbers: verdict, error, yardstick, ratio, allowed, worst element, allowed, where it is (flat), order.
    single, real: its key and its shape on one device.
    """

    key: Key
    split: Split
    shape: tuple[int, ...]
    local: Tensor | None
    exact: Tensor | None
    spread: Spread | InSingle | None
    numbers: tuple[float, ...]
    wrong: Tensor | None = None
    single: Key | None = None
    real: tuple[int, ...] | None = None


def measure(
    key: Key,
    split: Split,
    shape: tuple[int, ...],
    tensor: Tensor | None,
    spread: Spread | InSingle | None,
    order: int,
    mesh: MeshView,
) -> Measured:
    """Compare this rank's tensor with its part of the exact one; called on every rank, as partial sums are summed here.

    Args:
        spread: the exact tensor and the errors of one device; None where one device has no such tensor.
        shape: the global shape as it is stored; what is beyond the exact tensor is padding, which must be zero in
            gradients and may be anything elsewhere.
    """

    def found(verdict: Verdict, *numbers: float) -> Measured:
        measured = numbers or (inf, 0.0, inf, 1.0, inf, 1.0, 0.0)
        return Measured(key, split, shape, local, exact, spread, (VERDICTS.index(verdict), *measured, order), wrong)

    wrong: Tensor | None = None
    local = None if tensor is None else local_part(tensor)
    exact = None
    if spread is None:
        return found("rounding", 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0) if local is None else found("unexpected")
    real = spread.exact
    held = split.indices(shape, mesh.shape, mesh.coordinate)
    part = [len(at) for at in held]
    exact = fit(real, shape)
    got = _summed(local, split, exact, mesh) if split.partial else local
    if got is None:
        return found("rounding", 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0) if 0 in part else found("missing")
    if list(got.shape) != part:
        return found("wrong shape")
    wanted = split.shard(exact, mesh.shape, mesh.coordinate)
    got = got.detach().to(wanted)
    error = (got - wanted).abs_()
    largest = float(error.max()) if error.numel() else 0.0
    if largest <= spread.surely and bool(real.any()):  # by far the most tensors of a step in float64
        most = largest / spread.surely if largest else 0.0
        return found("rounding", largest, spread.surely, most, 1.0, most, 1.0, 0.0)
    if isnan(largest):  # infinite in both is no error
        error = torch.where(got == wanted, 0.0, error)
    least = floor(real, torch.float64 if local is None else local.dtype, len(exchange.coordinates(mesh)))
    own, scale = (fit(size, shape) for size in spread.sizes(least))
    unit, yard = (split.shard(size, mesh.shape, mesh.coordinate) for size in (scale, own))
    if tuple(real.shape) != shape and key[0] != "gradient" and real.dim() == len(shape):
        inside = torch.zeros(shape, dtype=torch.bool, device=exact.device)
        inside[tuple(slice(size) for size in real.shape)] = True
        error = torch.where(split.shard(inside, mesh.shape, mesh.coordinate), error, torch.zeros_like(error))
    for dim, index in enumerate(held):
        nothing = (index < 0).nonzero().flatten()
        if len(nothing):  # elements that are none of the tensor's
            error = error.index_fill(dim, nothing.to(error.device), 0)
    bounds = Bounds.of(spread.freedom * error.numel() / max(exact.numel(), 1), exact.numel())
    if not error.numel():
        return found("rounding", 0.0, 0.0, 0.0, bounds.norm, 0.0, bounds.element, 0.0)
    far = (error / unit).masked_fill_(error == 0, 0.0)
    at = int(far.argmax())
    length, rounding = (float(torch.linalg.vector_norm(one)) for one in (error, yard))
    ratio = 0.0 if length == 0 else length / rounding if rounding > 0 else inf
    ratio, element = (inf if isnan(x) else x for x in (ratio, float(far.reshape(-1)[at])))
    finite = isfinite(length) and (isfinite(rounding) or bool(yard[wanted.isfinite()].isfinite().all()))
    verdict: Verdict = "rounding"
    if spread.blind and not bool(real.any()):
        verdict = "not judged"
    elif not finite:
        verdict = "not finite"
    elif ratio > bounds.norm or element > bounds.element:
        verdict = "bug"
    elif key[0] in _MAY_BE_ZERO and not bool(real.any()) and not bool(error.any()):
        verdict = "not judged"
    wrong = far > bounds.element
    where = _flat(at, error, split, shape, mesh)
    return found(verdict, length, rounding, ratio, bounds.norm, element, bounds.element, where)


def _summed(local: Tensor | None, split: Split, exact: Tensor, mesh: MeshView) -> Tensor | None:
    """The terms of a partial sum added up in float64; None where one is missing."""
    mine = [
        tensor
        for tensor, at in zip(exchange.tensors_of_all(local, mesh), exchange.coordinates(mesh))
        if all(at[axis] == mesh.coordinate[axis] for axis in mesh.axes if axis not in split.partial)
    ]
    terms = [tensor.to(exact) for tensor in mine if tensor is not None]
    complete = len(terms) == len(mine) and len({term.shape for term in terms}) == 1
    return torch.stack(terms).sum(0) if complete else None


def _flat(at: int, local: Tensor, split: Split, shape: Sequence[int], mesh: MeshView) -> float:
    """The place in the global tensor, row-major, of an element of this rank's part."""
    index = torch.unravel_index(torch.tensor(at), local.shape) if local.dim() else ()
    flat = 0
    for here, held, size in zip(index, split.indices(shape, mesh.shape, mesh.coordinate), shape):
        flat = flat * size + max(int(held[here]), 0)
    return float(flat)


def rows_of(measured: Sequence[Measured], mesh: MeshView) -> list[Row]:
    """Each tensor as it is on the rank where it is worst; the same on every rank. One exchange."""
    if not measured:
        return []
    mine = torch.tensor([one.numbers for one in measured], dtype=torch.float64, device=mesh.device)
    everyones = exchange.same_shape_of_all(mine, mesh).cpu()
    rows = []
    for at, one in enumerate(measured):
        by_rank = [_row(one, everyones[rank, at].tolist(), rank) for rank in range(len(everyones))]
        first = by_rank[0].order
        worst = max(by_rank, key=lambda row: (not row.ok, row.score))
        rows.append(Row(**{**vars(worst), "order": first}))
    return rows


def _row(one: Measured, numbers: Sequence[float], rank: int) -> Row:
    verdict, error, yardstick, ratio, allowed, element, element_allowed, flat, order = numbers
    index = torch.unravel_index(torch.tensor(int(flat)), one.shape) if one.shape and 0 not in one.shape else ()
    return Row(
        name=one.key[1],
        kind=one.key[0],
        split=str(one.split),
        shape=one.shape,
        order=int(order),
        error=error,
        yardstick=yardstick,
        ratio=ratio,
        allowed=allowed,
        element=element,
        element_allowed=element_allowed,
        index=tuple(int(i) for i in index),
        rank=rank,
        verdict=VERDICTS[int(verdict)],
    )


def size_of_rounding(one: Measured, mesh: MeshView) -> Tensor | None:
    """Of each element of the whole tensor, as it is stored."""
    if one.spread is None:
        return None
    dtype = torch.float64 if one.local is None else one.local.dtype
    least = floor(one.spread.exact, dtype, len(exchange.coordinates(mesh)))
    return fit(one.spread.sizes(least)[1], one.shape)


def observe(one: Measured, mesh: MeshView) -> Observed:
    """Everything about one tensor, from every rank."""
    kind: Kind = one.key[0]
    locals = tuple(exchange.tensors_of_all(one.local, mesh))
    exact = one.exact if one.exact is not None else torch.zeros(one.shape, dtype=torch.float64)
    found = size_of_rounding(one, mesh)
    scale = torch.zeros(one.shape, dtype=torch.float64) if found is None else found
    return Observed(one.key[1], kind, locals, exact, one.split, dict(mesh.shape), exchange.coordinates(mesh), scale)
