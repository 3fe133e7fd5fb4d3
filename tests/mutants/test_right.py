"""No right program is accused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import forked
import pytest
import torch
from torch import Tensor, nn

from shardgrad.mutants.by_hand import Group
from shardgrad.mutants.right import kind as kinds
from shardgrad.mutants.right import mlps, table
from shardgrad.testing import distributed

ROOMS = ("mlps", "norms", "attention", "heads", "data", "operations", "layers")
FEW = (
    "ReLU, many kinks",
    "gate and up in one matrix",
    "ranks without a shard",
    "E[x²] − E[x]², mean 30",
    "LoRA",
    "grouped queries",
    "three KV heads, on any ranks",
    "vocabulary sharded, tied",
    "experts, two a token",
    "rows over dp, summed by hooks",
    "a UserDict comes in",
)


def accused(room: str, dtype: torch.dtype, ranks: int, only: tuple[str, ...] = ()) -> list[table.Verdict]:
    """The accused of a file's kinds (all: of every file)."""
    mesh, found = table.mesh_of(ranks), []
    with warnings.catch_warnings():  # of torch's wrappers and transformers
        warnings.simplefilter("ignore")
        for one in table.KINDS if room == "all" else getattr(table, room).KINDS:
            if dtype in one.dtypes and (not only or one.name in only):
                verdict = table.try_one(one, dtype, mesh)
                found += [verdict] if verdict.said == table.ACCUSED else []
    return found


def test_there_are_many_kinds_each_with_a_name_of_its_own() -> None:
    assert len({one.name for one in table.KINDS}) == len(table.KINDS) >= 100
    assert sum(len(one.dtypes) >= 3 for one in table.KINDS) >= 90
    assert set(FEW) <= {one.name for one in table.KINDS}


@distributed(world_size=[2, 3], timeout=120.0, backend="shm")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_few_are_not_accused(world_size: int, dtype: str) -> None:
    assert accused("all", getattr(torch, dtype), world_size, FEW) == []


@pytest.mark.slow
@distributed(world_size=[2], timeout=400.0)
@pytest.mark.parametrize(
    "dtype",
    [pytest.param("float32", marks=pytest.mark.rare), "bfloat16", pytest.param("float16", marks=pytest.mark.rare)],
)
@pytest.mark.parametrize("room", ROOMS)
def test_none_is_accused(world_size: int, room: str, dtype: str) -> None:
    assert accused(room, getattr(torch, dtype), world_size) == []


@pytest.mark.slow
@pytest.mark.rare
@distributed(world_size=[1, 3, 4], timeout=400.0)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("room", ROOMS)
def test_none_is_accused_on_other_ranks(world_size: int, room: str, dtype: str) -> None:
    assert accused(room, getattr(torch, dtype), world_size) == []


class _Forgets(nn.Module):
    """A row product whose sum is forgotten."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        self.up, self.down = kinds.column(tp, 6, 12), kinds.row(tp, 12, 6)
        if tp is not None:
            self.down.leave = tp.same

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


@distributed(world_size=[2])
def test_a_program_that_is_wrong_or_fails_is_told(world_size: int) -> None:
    mesh, x = table.mesh_of(world_size), kinds.randn(5, 6)
    wrong = table.try_one(kinds.Kind("wrong", kinds.both(_Forgets, [x])), torch.float32, mesh)
    assert (wrong.said, wrong.of) == (table.ACCUSED, "output of down")
    fails = kinds.Kind("fails", kinds.both(_Forgets, [x[:, :5]]))
    told = table.try_one(fails, torch.float32, mesh)
    assert told.said == table.ACCUSED
    assert "Error" in told.of
    right = table.try_one(mlps.KINDS[0], torch.float32, mesh)
    assert right.said == table.PASSES, right
    columns, rows = table.rows([wrong, replace(right, dtype="bfloat16"), told])
    assert columns == ["right program", "float32", "bfloat16"]
    assert rows[1] == ["GELU", "", "passes"]
    assert table.summary([wrong, right]).endswith("1 pass, of 0 it cannot be told, 1 are accused.")


@distributed(world_size=[2, 3])
def test_ranks_store_what_torch_chunk_gives_them(world_size: int) -> None:
    tp = Group(table.mesh_of(world_size))
    whole = kinds.randn(2, 3)
    parts = [kinds.part(whole, dim, tp) for dim in (0, 1)]
    for dim, part in enumerate(parts):
        chunks = whole.chunk(world_size, dim)
        assert torch.equal(part, chunks[tp.index] if tp.index < len(chunks) else whole.narrow(dim, 0, 0))
    assert torch.equal(kinds.part(whole, None, tp), whole)


@pytest.mark.slow
def test_the_command_tells_what_is_said_of_each() -> None:
    status, told = forked.command(2, "mutants", "--right", "two KV heads", "--json")
    assert status == 0, told
    found = json.loads(told[0])
    assert [(one["dtype"], one["said"]) for one in found] == [
        ("float32", "passes"), ("bfloat16", "passes"), ("float16", "passes"),
    ]  # fmt: skip
