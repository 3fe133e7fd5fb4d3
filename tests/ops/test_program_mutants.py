"""Every instruction counts: a program without one, or with one changed, is found wrong or does not run at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad import PRESETS, Layout
from shardgrad.errors import ShapeError
from shardgrad.layout import lower, program
from shardgrad.layout.schedule import (
    Add,
    AddBias,
    Communicate,
    Instruction,
    Instructions,
    Matmul,
    Slice,
    SumBias,
    Wait,
    communication,
)
from shardgrad.testing import distributed

LAYOUTS = [str(layout) if layout.has_bias else f"{layout} + {layout.bias}" for layout in PRESETS.values()]
LAYOUTS += [
    "X[n,d/tp] W[d/tp,m] -> Y[n/tp,m] + B[m/tp]",  # the bias is gathered, its gradient reduce-scattered
    "X[a,n/tp,d] W[k,d,m/tp] -> Y[n,a,m/tp,k] + B[k,m/tp]",  # letters in other orders
]
SIZES = {"n": 12, "d": 24, "m": 36, "e": 12, "k": 12, "a": 2}  # all ranks raise, or none does
Mutant = tuple[str, Callable[[Instructions], Instructions]]


def mutants(instructions: Instructions) -> Iterator[Mutant]:
    """Each instruction that computes or moves data left out or changed, told in a few words."""
    for at, one in enumerate(instructions):
        if isinstance(one, Communicate):
            what = f"{one.phase}: {one.move.kind} of {one.tensor} over {one.move.axis}"
            yield f"no {what}", without(at, waits_too=True)
            if one.move.kind == "all-reduce":
                yield f"twice the {what}", twice(at)
        elif isinstance(one, Slice | AddBias):
            yield f"{one.phase}: no {type(one).__name__}", without(at)
        elif isinstance(one, SumBias):  # left out, autograd itself would sum what has too many dims
            yield "db: added to itself", doubled(at, one.out)
        elif isinstance(one, Matmul):
            yield f"{one.phase}: operands exchanged", changed(at, left=one.right, right=one.left)
            if one.bias is not None:
                yield f"{one.phase}: no bias", changed(at, bias=None)


def without(at: int, *, waits_too: bool = False) -> Callable[[Instructions], Instructions]:
    def change(instructions: Instructions) -> Instructions:
        gone = instructions[at]
        left = [*instructions[:at], *instructions[at + 1 + waits_too :]]
        if isinstance(gone, Communicate | Slice):  # what was to become `out` stays what it was
            named = [rename(one, gone.out, gone.src) for one in left]
            begun = {id(old): new for old, new in zip(left, named)}
            left = [replace(one, started=begun[id(one.started)]) if isinstance(one, Wait) else one for one in named]
        return tuple(left)

    return change


def rename(one: Instruction, old: str, new: str) -> Instruction:
    if old == new or old in one.writes:
        return one
    fields = {name: getattr(one, name) for name in ("src", "left", "right", "bias") if hasattr(one, name)}
    fields = {name: new for name, value in fields.items() if value == old}
    if hasattr(one, "results"):
        fields["results"] = tuple(new if value == old else value for value in one.results)
    return replace(one, **fields)  # type: ignore[arg-type]


def twice(at: int) -> Callable[[Instructions], Instructions]:
    def change(instructions: Instructions) -> Instructions:
        started = instructions[at]
        assert isinstance(started, Communicate)
        again = replace(started, src=started.out)
        return (*instructions[: at + 2], again, Wait(again.phase, again), *instructions[at + 2 :])

    return change


def doubled(at: int, value: str) -> Callable[[Instructions], Instructions]:
    return lambda instructions: (*instructions[: at + 1], Add("db", value, value, value), *instructions[at + 1 :])


def changed(at: int, **fields: str | None) -> Callable[[Instructions], Instructions]:
    def change(instructions: Instructions) -> Instructions:
        return (*instructions[:at], replace(instructions[at], **fields), *instructions[at + 1 :])  # type: ignore[arg-type]

    return change


def finds(layout: Layout, sizes: dict[str, int], axes: dict[str, int]) -> bool:
    """Whether the product is seen to be wrong, on this rank or another."""
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    try:
        ok = sg.check_product(layout, sizes, mesh, exact=True, seed=4).ok
    except (RuntimeError, ShapeError, ValueError, IndexError):
        ok = False
    worst = torch.tensor([float(ok)])
    torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MIN)
    return not bool(worst)


def meshes(layout: Layout, world_size: int) -> dict[str, int]:
    """As many ranks along the last axis of the layout, one along all others but, if there are four ranks, two."""
    axes = dict.fromkeys(layout.axes, 1)
    if world_size == 4 and len(axes) > 1:
        return axes | dict.fromkeys(layout.axes[-2:], 2)
    return axes | {layout.axes[-1]: world_size}


@distributed(world_size=[2, 3, 4])
@pytest.mark.parametrize("text", LAYOUTS)
def test_every_instruction_counts(world_size: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(text)
    axes = meshes(layout, world_size)
    sizes = {letter: SIZES[letter] for letter in layout.letters}
    assert not finds(layout, sizes, axes)
    real = {"forward": lower.forward, "backward": lower.backward}
    survivors, planted = [], 0
    for name, make in real.items():
        lists: list[Instructions] = []
        with monkeypatch.context() as patch:
            patch.setattr(program, name, lambda *given, **more: lists.append(make(*given, **more)) or lists[-1])  # noqa: B023
            assert not finds(layout, sizes, axes)
        for told, change in mutants(lists[0]):
            with monkeypatch.context() as patch:
                patch.setattr(program, name, lambda *given, **more: change(make(*given, **more)))  # noqa: B023
                planted += 1
                if not finds(layout, sizes, axes):
                    survivors.append(told)
    assert planted >= 3 + len(list(communication(layout.instructions(axes))))
    assert not survivors
