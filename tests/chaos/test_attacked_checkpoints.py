"""Damaged checkpoints: each is refused by name and the one before it is used, or nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.device_mesh import init_device_mesh

from shardgrad.chaos import checkpoints
from shardgrad.checkpoint import seal
from shardgrad.testing import distributed


@distributed(world_size=[1], timeout=120, backend="shm")
@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_every_attack_is_held(world_size: int, tmp_path: Path, count: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    rows = checkpoints.run(mesh, tmp_path, seed=count, count=count)
    assert [failure for row in rows for failure in row.failures] == []
    assert [(row.tried, row.held) for row in rows] == [
        *((4 * count, 4 * count), (4 * count, 4 * count), (4, 4), (15, 15), (8, 8)),
        *((2 * count, 2 * count), (4 * count, 4 * count), (4 * count, 4 * count)),
    ]


@distributed(world_size=[1], backend="shm")
def test_what_does_not_hold_is_told(world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    monkeypatch.setattr(
        seal, "_sha256", lambda path, real=seal._sha256: real(path) if path.suffix == ".json" else "0" * 64
    )
    rows = {row.attack: row for row in checkpoints.run(mesh, tmp_path, seed=1, count=2)}
    assert any(failure.endswith(": accepted") for failure in rows["files of another checkpoint"].failures)
    assert rows["a bit flipped"].held < rows["a bit flipped"].tried
