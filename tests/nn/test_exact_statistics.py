"""Numbers of sharded logits in exact mode: the same bits on every mesh of tensor and data parallel ranks."""

from __future__ import annotations

import pytest
import torch
from bits import Meshes, normal
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.layout.notation import parse_tensor
from shardgrad.nn.token_sums import statistics_collectives
from shardgrad.testing import distributed

PIECES = {"dp": 2, "tp": 4}
VOCABULARY = 4 * 13


@distributed(world_size=4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_and_its_gradients(world_size: int, dtype: torch.dtype) -> None:
    meshes = Meshes(PIECES)
    tokens = torch.randint(0, VOCABULARY, (6, 12, 2), generator=torch.Generator().manual_seed(4))
    full, second = (normal(6, 12, VOCABULARY, seed=seed, dtype=dtype) for seed in (1, 2))
    spec, rows, pairs = (parse_tensor(text) for text in ("L[b/dp,s,v/tp]", "N[b/dp,s]", "T[b/dp,s,k]"))

    def run(mesh: DeviceMesh) -> dict[str, Tensor]:
        mine, its = (sg.shard(one, spec, mesh).requires_grad_() for one in (full, second))
        policy, reference = (
            sg.VocabParallelLogits(one, vocab_size=VOCABULARY, mesh=mesh, token_axes="dp", temperature=0.7, soft_cap=5)
            for one in (mine, its)
        )
        found = policy.statistics(
            sg.shard(tokens, pairs, mesh), logsumexp=True, entropy=True, mean_log_prob=True, kl=reference
        )._asdict()
        grads = {}
        for at, (name, value) in enumerate(found.items()):
            stored = pairs if name == "log_prob" else rows
            flow = sg.shard(normal(6, 12, *([2] if stored is pairs else []), seed=10 + at), stored, mesh)
            value.backward(flow.to(value.dtype), retain_graph=True)
            found[name] = sg.unshard(value.detach(), stored, mesh)
        for name, leaf in (("dlogits", mine), ("dsecond", its)):
            assert leaf.grad is not None
            grads[name] = sg.unshard(leaf.grad, spec, mesh)
        with torch.no_grad():
            grads["log_softmax"] = sg.unshard(policy.log_softmax(), spec, mesh)
        with pytest.raises(sg.LayoutError, match="the gradient of log_softmax cannot be exact"):
            policy.log_softmax()
        return {**found, **grads}

    meshes.run(str(dtype), run)
    meshes.assert_same()


@distributed(world_size=2)
def test_bytes_are_as_predicted(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    sg.set_exact(mesh, 4)
    logits = sg.VocabParallelLogits(torch.randn(3, 4), vocab_size=8, mesh=mesh)
    with sg.trace_collectives() as traced:
        logits.statistics(torch.tensor([1, 7, -100]), entropy=True, kl=logits)
    predicted = statistics_collectives(3, torch.float32, mesh=mesh, chosen=1, entropy=True, kl=True)
    assert traced.bytes == sum(collective.bytes for collective in predicted)
    assert traced.bytes
