"""Explanations of what ranks add up: terms that are not added, or added over other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardgrad.verification.hypothesis import Context, Evidence, Hypothesis, list_of
from shardgrad.verification.observed import Observed
from shardgrad.verification.rounding import floor


def scaled(seen: Evidence, c: float) -> tuple[list[Tensor], list[Tensor]]:
    """So many times the right tensors, and what rounding does to them."""
    return [c * right for right in seen.right], [abs(c) * size for size in seen.size]


def _reduce(seen: Evidence, axes: Sequence[str]) -> str:
    """Where the reduction belongs, by what the tensor is."""
    over = list_of(axes)
    return {
        "output": f"reduce the terms over {over} after the product whose summed dim is sharded (sg.all_reduce, "
        "sg.reduce_scatter; Megatron: reduce_from_tensor_model_parallel_region), and use what it returns",
        "output gradient": f"what comes next uses this output differently on each rank of {over}: let it pass "
        "sg.replicate, whose backward is the all-reduce (Megatron: copy_to_tensor_model_parallel_region)",
        "input gradient": f"let the input pass sg.replicate over {over}, whose backward is the all-reduce",
        "gradient": f"each rank of {over} sees only its own rows, heads or features: all-reduce this gradient over "
        f"{over} after backward, or let the parameter pass sg.replicate",
        "loss": f"all-reduce the loss over {over}: each rank has the part of its own rows or classes",
    }.get(seen.kind, f"all-reduce it over {over}")


def same_on(axes: Sequence[str], seen: Evidence) -> bool:
    """Whether the ranks of these axes have the same tensors."""
    return all(
        bool(((seen.held[rank] - seen.held[group[0]]).abs() <= seen.allowed * seen.size[rank]).all())
        for group in seen.groups(axes)
        for rank in group
    )


def _size_of_sum(seen: Evidence, axes: Sequence[str]) -> list[Tensor]:
    """What rounding does to the sum of the ranks' tensors."""
    squares = [floor(held, seen.dtype, 1).square() + size.square() for held, size in zip(seen.held, seen.size)]
    return [square.sqrt() for square in seen.summed(squares, axes)]


def sum_missing(seen: Evidence, known: Context) -> Iterator[Hypothesis]:
    """The ranks' tensors are terms: only their sum (or mean) is right."""
    for axes, ranks in seen.axes(sharded=False) if seen.fits else ():
        if same_on(axes, seen):
            continue
        over, total = list_of(axes), seen.summed(seen.held, axes)
        size = _size_of_sum(seen, axes)
        says = f"the ranks of {over} hold different terms, which add up to the right tensor"
        yield Hypothesis(f"sum over {over} missing", says, _reduce(seen, axes), seen.right, size, total)
        mean, part = [t / ranks for t in total], [s / ranks for s in size]
        says = f"the ranks of {over} hold different tensors, of which the mean is right"
        remedy = f"all-reduce it over {over} and divide by {ranks}"
        yield Hypothesis(f"mean over {over} missing", says, remedy, seen.right, part, mean)
        for other, factor in seen.axes():
            if not set(other) & set(axes):
                wanted, more = scaled(seen, factor)
                says = f"it was summed over {list_of(other)}, but its terms lie over {over}"
                remedy = f"reduce over {over} instead of {list_of(other)}"
                bound = [torch.maximum(a, b) for a, b in zip(more, size)]
                yield Hypothesis(f"summed over {list_of(other)} instead of {over}", says, remedy, wanted, bound, total)


def terms_of_a_sum(found: Observed) -> tuple[str, ...] | None:
    """The axes over which the ranks' tensors differ and add up to the right tensor; None if there are none."""
    seen = Evidence(found)
    for axes, _ in seen.axes(sharded=False) if seen.fits else ():
        if not same_on(axes, seen) and all(
            bool(((total - right).abs() <= seen.allowed * size).all())
            for total, right, size in zip(seen.summed(seen.held, axes), seen.right, _size_of_sum(seen, axes))
        ):
            return axes
    return None
