"""The contenders compute the same sums; commands refuse what they cannot measure. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typer.testing import CliRunner

from shardgrad.bench import gpu, model, overhead, overlap, peers, step
from shardgrad.bench.timing import Spread
from shardgrad.cli import ranks
from shardgrad.cli.app import app
from shardgrad.comm.shm.register import register
from shardgrad.testing import distributed

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
N, D, M = 5, 6, 12


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != peers.LOCAL])
def test_every_contender_computes_the_same(world_size: int, rank: int, name: str) -> None:
    """Y, dX and both dW in float64, of weights that all ranks know whole: what is timed is the same work."""
    if peers.missing(name):
        pytest.skip(str(peers.missing(name)))
    register()
    for backend in step.BACKENDS:
        group = dist.new_group(range(world_size), backend=backend)
        check(peers.PEERS[name], DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",)), rank)
    peers.forget_groups()


def check(peer: peers.Peer, mesh: DeviceMesh, rank: int) -> None:
    ranks = mesh.size()
    torch.manual_seed(3)
    x, dy, up, down = (torch.randn(*shape, dtype=torch.float64) for shape in ((N, D), (N, D), (M, D), (D, M)))
    whole = [tensor.clone().requires_grad_() for tensor in (x, up, down)]
    y = F.linear(F.gelu(F.linear(whole[0], whole[1])), whole[2])
    y.backward(dy)
    block = peer.make(D, M, torch.float64, mesh)
    w_up, w_down = block.parameters()
    x = x.requires_grad_()
    with torch.no_grad():
        local(w_up).copy_(up.chunk(ranks)[rank])
        local(w_down).copy_(down.chunk(ranks, 1)[rank])
    made = block(x)
    made.backward(dy)
    peers.arrive(made, x.grad)
    expected = (y, whole[0].grad, whole[1].grad.chunk(ranks)[rank], whole[2].grad.chunk(ranks, 1)[rank])
    for got, right in zip((made, x.grad, w_up.grad, w_down.grad), expected):
        torch.testing.assert_close(local(got).detach().clone(), right.detach(), rtol=1e-12, atol=1e-12)


@distributed(world_size=2)
def test_the_step_is_measured_of_every_contender(tmp_path: Path, rank: int) -> None:
    names = [name for name in peers.PEERS if name != "Megatron-core"]  # whose import takes seconds
    found = step.measure([(4, 6, 8)], [torch.float32], 2, names=names, turn=0.001)
    present = [name for name in names if peers.missing(name) is None]
    talking = {(name, backend) for name in present for backend in step.BACKENDS if name != peers.LOCAL}
    assert {(row.name, row.backend) for row in found.rows} == talking | {(peers.LOCAL, "")}
    for row in found.rows:
        assert row.time.median > 0
        assert (row.share is None) == (row.to_hand is None) == (row.name == peers.LOCAL)
        if row.name == peers.HAND:
            assert row.to_hand == Spread(1, 1, 1)
    assert set(found.against()) == {key for key in talking if key[0] != peers.OURS}
    for (_, backend), (same, on_shm) in found.against().items():
        assert on_shm is not None
        assert on_shm == same if backend == "shm" else on_shm > 0
    assert json.dumps(found.as_json())
    if rank == 0:
        step.draw(found, tmp_path / "step.png")
        assert (tmp_path / "step.png").stat().st_size > 5000


@pytest.mark.slow
@distributed(world_size=2)
def test_overlap_is_measured_in_every_case(tmp_path: Path, rank: int) -> None:
    rows, costs = overlap.measure([(6, 8, 10)], [torch.float32], 1, turn=0.001)
    ours = {(row.case, row.name) for row in rows if row.name in (overlap.WHOLE, overlap.CHUNKED)}
    assert ours == {(case, name) for case in overlap.CASES for name in (overlap.WHOLE, overlap.CHUNKED)}
    assert set(costs.links) == {"tp"}
    for row in rows:
        expected = (row.products.median + row.communication.median - row.together.median) / min(
            row.could.median, row.communication.median
        )
        assert row.hidden.median == pytest.approx(expected)  # of one round
        assert (row.unwaited is None) == (row.name not in (overlap.WHOLE, overlap.CHUNKED))
    assert json.dumps(overlap.as_json(rows, costs))
    if rank == 0:
        overlap.draw(rows, tmp_path / "overlap.png")


@pytest.mark.slow
@distributed(world_size=2)
def test_the_model_is_measured_on_one_rank_and_on_two(tmp_path: Path, rank: int) -> None:
    shape = model.Shape(layers=1, d_model=32, heads=2, seq_len=8, batch=2, vocab=64)
    rows = model.measure(shape, "gloo", 1)
    assert [(row.part, row.ranks) for row in rows] == [(part, ranks) for part in model.PARTS for ranks in (1, 2)]
    for row in rows:
        assert row.rate.median == pytest.approx(16 / row.time.median * 1e3)
    one, two = rows[2:]
    # Parameters, gradients and AdamW's two moments in float32: 12 d² + 2 v d numbers and more, four times.
    least = 4 * 4 * (12 * 32**2 + 2 * 64 * 32)
    assert least < two.peak + least / 2
    assert least < one.peak
    assert two.peak < one.peak < 10 * least
    if rank == 0:
        model.draw(rows, tmp_path / "model.png")


@distributed(world_size=1)
def test_overhead_is_measured_in_a_group_of_its_own() -> None:
    group = dist.group.WORLD
    dist.destroy_process_group()
    names = [peers.LOCAL, peers.HAND, peers.OURS]
    rows = overhead.measure(names, 6)
    assert not dist.is_initialized()
    assert group is not None
    assert [row.name for row in rows] == names
    assert rows[0].to_plain == Spread(1, 1, 1) == rows[1].to_hand
    assert all(0 < row.least <= row.cpu.median for row in rows)


@distributed(world_size=1)
def test_the_gpus_measurement_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its numbers: that every contender runs and leaves its gradient where it should."""
    mesh = torch.distributed.init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    rate, rows = gpu.measure(
        [gpu.Product("p", 6, 4, True), gpu.Product("q", 4, 6, False)], 3, mesh, torch.bfloat16, 2, 16
    )
    assert rate > 0
    assert [row.name for row in rows] == ["p", "q"]


def test_llamas_sizes() -> None:
    assert [(product.inner, product.outer) for product in gpu.llama_70b()] == [
        (8192, 10240),
        (8192, 8192),
        (8192, 28672),
        (28672, 8192),
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["step", "--sizes", "8x64"], "is no size"),
        (["step", "--sizes", "8x64x255"], "multiple of 2"),
        (["overlap", "--sizes", "7x64x256"], "multiple of 2"),
        (["step", "--dtypes", "fp8"], "is no dtype"),
        (["step", "--backends", "nccl"], "is not one of"),
        (["step", "--draw", "/nowhere/at/all.png"], "there is no folder"),
        (["overlap", "--draw", "times.txt"], "a picture ends in"),
        (["model", "--heads", "3"], "no multiple of 3 heads"),
        (["model", "--seq-len", "7"], "no multiple of 2 ranks"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_ranks_start(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert complaint in result.output.replace("\n", " ")


def test_ranks_of_another_launcher_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.count() is None
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert not ranks.inside()
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert ranks.inside()
    assert ranks.count() == 3
