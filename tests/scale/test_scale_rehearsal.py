"""One rank of many, in shapes alone: it holds and sends what arithmetic says."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardgrad as sg
from shardgrad.scale import idle
from shardgrad.scale.cell import Cell
from shardgrad.scale.dry import rehearse
from shardgrad.scale.resolve import resolve
from shardgrad.testing import distributed

ROOT = Path(__file__).parents[2]


def test_a_product_on_a_thousand_ranks() -> None:
    sizes = {"n": 2**20, "d": 2**14, "m": 2**15}  # W alone would take a gigabyte
    cell = resolve(Cell(layout="2d", sizes=sizes, mesh={"r": 32, "c": 32}, dtype="bfloat16"))
    found = rehearse(cell, 1023)
    assert found.shapes["X"] == [2**15, 2**9]
    assert found.shapes["W"] == [2**9, 2**10]
    # X is gathered over c for forward and for dW, dX scattered; W over r likewise.
    x, w = 31 * 2 * 2**15 * 2**9, 31 * 2 * 2**9 * 2**10
    assert found.traced == {
        "all-gather over c": 2 * x,
        "all-gather over r": 2 * w,
        "reduce-scatter over c": x,
        "reduce-scatter over r": w,
    }
    assert found.predicted == found.traced
    assert found.parameters == 2 * (2**15 * 2**9 + 2**9 * 2**10 + 2**15 * 2**10)
    assert found.gradients == 2 * (2**15 * 2**9 + 2**9 * 2**10)
    assert not dist.is_initialized()


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_uneven_parts_and_a_last_rank(rank: int) -> None:
    cell = resolve(Cell(layout="column", bias=True, sizes={"n": 5, "d": 3, "m": 15}, ranks=7))
    found = rehearse(cell, rank)
    assert found.shapes["W"] == [3, (3, 3, 3, 3, 3, 0, 0)[rank]]
    assert found.predicted == found.traced
    with pytest.raises(ValueError, match="rank 7"):
        rehearse(cell, 7)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_block_saves_activations_and_sends_what_its_layers_say(sequence_parallel: bool) -> None:
    sizes = {"batch": 3, "sequence": 10, "d": 12, "heads": 4}
    cell = resolve(Cell(kind="block", sizes=sizes, sequence_parallel=sequence_parallel, ranks=4))
    found = rehearse(cell, 3)
    assert found.predicted == found.traced != {}
    rows = 3 * (1 if sequence_parallel else 10)
    assert found.shapes["X"] == [3, rows // 3, 12]
    assert found.saved > 4 * rows * 12
    assert "all-reduce over tp" in found.traced
    assert ("all-gather over tp" in found.traced) == sequence_parallel


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_training_step_with_rows_sharded_and_replicated(kind: str, sequence_parallel: bool) -> None:
    """On 3 ranks, each with some of 7 positions or with all."""
    set_ = [f"model.kind={kind}", "model.layers=1", "model.heads=4", "model.d_model=24", "train.clip=null"]
    quickstart = str(ROOT / "configs" / "quickstart.yaml")
    sizes = {"sequence": 7, "batch": 2}
    cell = resolve(
        Cell(kind="step", train=quickstart, set=set_, sizes=sizes, mesh={"tp": 3}, sequence_parallel=sequence_parallel)
    )
    found = rehearse(cell, 2)
    assert found.predicted == found.traced != {}
    assert ("reduce-scatter over tp" in found.traced) == sequence_parallel
    rows, whole = 2 * 7, 4 * 2 * (3 - 1) * 24  # all-reduce: 2 (p - 1) / p of each element of fp32
    if not sequence_parallel:  # the sums of two products forward, of two inputs backward, embedding and head
        assert found.traced["all-reduce over tp"] >= 6 * rows * whole // 3
    assert idle.notes(cell) == ["1 of 3 ranks has no head (4/3)"]


@distributed(world_size=[2, 3])
def test_what_is_rehearsed_is_what_real_ranks_send() -> None:
    ranks = dist.get_world_size()
    layout = sg.Layout("X[n/tp,d] W[d,m/tp] -> Y[n,m/tp]")
    sizes = {"n": 7, "d": 5, "m": 8}
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    x = sg.shard(torch.randn(7, 5), layout["X"], mesh).requires_grad_()
    w = sg.shard(torch.randn(5, 8), layout["W"], mesh).requires_grad_()
    y = sg.matmul(x, w, layout, mesh, sizes=sizes)
    y.backward(torch.randn_like(y))
    with sg.trace_collectives() as traced:
        y = sg.matmul(x, w, layout, mesh, sizes=sizes)
        y.backward(torch.randn_like(y))
    most = -(-7 // ranks)
    gathered = 4 * (ranks - 1) * most * 5
    assert {key: count for key, (_, count) in traced.totals().items()} == {
        ("all-gather", "tp"): 2 * gathered,
        ("reduce-scatter", "tp"): gathered,
    }
    assert prod(x.shape) <= most * 5
