"""Every planted bug is caught and named as it should be; the programs without one are not accused."""

from __future__ import annotations

import json
import warnings

import forked
import pytest
import torch

from shardgrad.mutants import by_hand, decoder, decoder_planted, hand_planted, layers_planted, micro_batches
from shardgrad.mutants.run import mutants, programs, verified
from shardgrad.testing import distributed

LONG = [hand_planted.TP, hand_planted.SP, decoder_planted.TP, decoder_planted.SP, micro_batches.NAME]
NAMES = [*LONG, *layers_planted.PROGRAMS]
FEW = (
    "the sum of a row-parallel product is dropped",
    "dX of one of two products of an input is not summed",
    "every rank adds the bias",
    "rows are sharded without being summed",
    "each rank keeps the next rank's rows",
    "the norm counts replicas p times",
    "queries' positions begin at rank times part",
    "another base of rotary positions",
    "epsilon outside the root, written out",
    "labels smoothed over the rank's vocabulary",
    "terms of an output are summed in bfloat16",
    "learned positions begin at 1",
    "zero_grad between micro-batches",
    "each rank clips its gradient before the sum",
    "the norm is of each rank's own gradients, before the sum",
)


def problems(names: list[str], program: str, ranks: int) -> list[str]:
    """Those of these bugs that are missed, or named otherwise than they should be."""
    make, found = programs(ranks)[program], []
    for one in mutants():
        if one.program != program or (names and one.name not in names):
            continue
        planted = make()
        one.plant(planted)
        report = verified(planted)
        fits = [fit.name for diagnosis in report.diagnoses for fit in diagnosis.fits]
        if report.ok or (one.expected not in fits if one.expected else fits):
            found.append(f"{one.name}: {'missed' if report.ok else fits}, expected {one.expected!r}")
    return found


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    every = [*hand_planted.MUTANTS, *decoder_planted.MUTANTS, *micro_batches.MUTANTS, *layers_planted.MUTANTS]
    assert len({one.name for one in every}) == len(every) >= 100
    assert all(one.origin for one in every)


@distributed(world_size=[2], timeout=240.0, backend="shm")
@pytest.mark.parametrize(
    "program", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in NAMES]
)
def test_every_bug_is_caught_and_named(world_size: int, program: str) -> None:
    with warnings.catch_warnings():  # Megatron-core's and fairscale's own
        warnings.simplefilter("ignore")
        assert verified(programs(world_size)[program]()).ok
        assert problems([], program, world_size) == []


@pytest.mark.slow
@distributed(world_size=[3], timeout=120.0, backend="shm")
@pytest.mark.parametrize(
    "program", [pytest.param(name, marks=() if name in LONG[1::3] else pytest.mark.rare) for name in LONG]
)
def test_some_of_the_long_lists(world_size: int, program: str) -> None:
    assert verified(programs(world_size)[program]()).ok
    assert problems(list(FEW), program, world_size) == []


@distributed(world_size=[1, 2], timeout=120.0)
def test_the_programs_are_not_accused_in_bfloat16(world_size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    for sp in (False, True):
        for make in (by_hand.program, decoder.program):
            report = verified(make(mesh, sp=sp, dtype=torch.bfloat16), seed=3)
            assert report.ok, report.table()


@pytest.mark.slow
def test_the_command_tells_what_passes_the_usual_checks() -> None:
    status, told = forked.command(2, "mutants", "one rank scales", "--json", "--steps", "10")
    assert status == 0, told
    planted, control = json.loads(told[0])
    assert planted["caught"]
    assert planted["found"] == ["scaled by a constant"]
    assert planted["usual"]["passes"], "a gradient that is 10 % off trains as well"
    assert not control["caught"]
    assert control["usual"]["loss"] == pytest.approx(control["usual"]["loss_single"], rel=1e-4)
