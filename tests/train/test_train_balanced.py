"""Training decoders on balanced axes: gradients against one device, bytes against the prediction, and the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_parallel import GRIDS, WAYS, check
from test_verify_run import config_of, meshed
from tiny import decoder, reference
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad import checkpoint
from shardgrad.comm.mesh import view
from shardgrad.testing import distributed
from shardgrad.train import verify as whole
from shardgrad.train.build import build_model


@distributed(world_size=[2, 3, 4], timeout=120, backend="shm")
@pytest.mark.parametrize(
    "way",
    [
        "sharded",
        *(
            pytest.param(w, marks=pytest.mark.slow)
            for w in ("replicated, micro-batches", "sharded, deferred, recomputed")
        ),
    ],
)
def test_loss_gradients_and_bytes(world_size: int, way: str) -> None:
    switches, accumulate, recompute, keys = WAYS[way]
    for grid in GRIDS[world_size]:
        mesh = init_device_mesh("cpu", grid, mesh_dim_names=("dp", "tp"))
        sg.set_balanced(mesh)
        model, values = decoder(mesh, data=sg.BatchAxis("dp", **switches), recompute=recompute, **keys)
        check(model, reference(values, **keys), accumulate)


@distributed(world_size=[3], backend="shm")
def test_the_key_of_the_configuration(world_size: int, tmp_path: Path) -> None:
    """The model is verified, and its checkpoint is that of a mesh that shards as torch.chunk."""
    sizes = {"kind": "llama", "heads": 7, "d_model": 14}
    config, mesh = meshed(config_of({"tp": world_size, "balanced": True}, sizes))
    found = whole.verify_run(config, mesh)
    assert found.ok, found.table()
    assert {type(ranks) for ranks in view(mesh).shape.values()} == {sg.Balanced}
    torch.manual_seed(1)
    model = build_model(config, 38, mesh)
    plain_config, plain_mesh = meshed(config_of({"tp": world_size}, sizes))
    torch.manual_seed(1)
    plain = build_model(plain_config, 38, plain_mesh)
    state = sg.state_dict(model)
    assert all(
        torch.equal(one, right) for one, right in zip(state.values(), sg.state_dict(plain).values(), strict=True)
    )
    for parameter in model.parameters():
        parameter.data.mul_(2)
    checkpoint.save(tmp_path / "saved", model, mesh=mesh)
    checkpoint.load(tmp_path / "saved", plain)
    for name, value in sg.state_dict(plain).items():
        assert torch.equal(value, 2 * state[name])
