"""Embedding and norms against torch's."""

from __future__ import annotations

import pytest
import torch
from plain import assert_gradients_match, load_from, randn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.layout.notation import Dim
from shardgrad.testing import distributed

D = torch.float64
CUT = sg.Layout("X[b,s,d/tp] W[m,d/tp] -> Y[b,s/tp,m]")["Y"]
WHOLE = sg.Layout("X[b,s,d] W[m,d] -> Y[b,s,m]")["Y"]


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("vocabulary", [2, 3, 10, 257])
@pytest.mark.parametrize("sequence_dim", [None, 1])
@pytest.mark.parametrize("padding", [None, 1, -1])
def test_embedding(world_size: int, vocabulary: int, sequence_dim: int | None, padding: int | None) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(5)
    table = sg.VocabParallelEmbedding(vocabulary, 4, padding, mesh=mesh, sequence_dim=sequence_dim, dtype=D)
    plain = load_from(nn.Embedding(vocabulary, 4, padding, dtype=D), table)
    assert padding is None or not bool(plain.weight[padding].any())  # type: ignore[index]
    ids = torch.randint(0, vocabulary, (3, 5), generator=torch.Generator().manual_seed(1))
    spec = WHOLE if sequence_dim is None else CUT
    dy = randn(3, 5, 4, seed=2)
    y = table(ids)
    y.backward(sg.shard(dy, spec, mesh))
    expected = plain(ids)
    expected.backward(dy)
    assert torch.equal(sg.unshard(y, spec, mesh), expected.detach())
    assert_gradients_match(table, plain)


@distributed(world_size=[1, 2, 3])
def test_ids_outside_the_vocabulary_are_refused_on_every_rank(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    table = sg.VocabParallelEmbedding(10, 4, mesh=mesh)
    for wrong in (10, -1):
        with pytest.raises(IndexError, match=f"ids reach from .*{wrong}.*outside the vocabulary of 10"):
            table(torch.tensor([[0, wrong]]))
    assert table(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 4)
    with pytest.raises(sg.ShapeError, match="padding_idx=10 is outside"):
        sg.VocabParallelEmbedding(10, 4, 10, mesh=mesh)


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize(
    "kind", ["layer", "layer without bias", "rms", "layer over two dims", "layer without parameters"]
)
@pytest.mark.parametrize("sequence_dim", [None, 1])
def test_norms_have_complete_gradients(world_size: int, kind: str, sequence_dim: int | None) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    given = {"mesh": mesh, "sequence_dim": sequence_dim, "dtype": D}
    sharded, plain = {
        "layer": lambda: (sg.LayerNorm(6, **given), nn.LayerNorm(6, dtype=D)),
        "layer without bias": lambda: (sg.LayerNorm(6, bias=False, **given), nn.LayerNorm(6, bias=False, dtype=D)),
        "layer over two dims": lambda: (sg.LayerNorm((2, 6), **given), nn.LayerNorm((2, 6), dtype=D)),
        "layer without parameters": lambda: (
            sg.LayerNorm(6, elementwise_affine=False, **given),
            nn.LayerNorm(6, elementwise_affine=False),
        ),
        "rms": lambda: (sg.RMSNorm(6, 1e-3, **given), nn.RMSNorm(6, 1e-3, dtype=D)),
    }[kind]()
    shape = (3, 5, 2, 6) if "two" in kind else (3, 5, 6)
    with torch.no_grad():
        for at, parameter in enumerate(sharded.parameters()):
            parameter.add_(randn(*parameter.shape, seed=at))
    load_from(plain, sharded)
    letters = ",".join(["b", "s" if sequence_dim is None else "s/tp", "x", "y"][: len(shape)])
    stored = sg.TensorSpec("X", tuple(Dim(c[0], tuple(c.split("/")[1:])) for c in letters.split(",")))
    x, dy = randn(*shape, seed=8), randn(*shape, seed=9)
    local = sg.shard(x, stored, mesh).requires_grad_()
    y = sharded(local)
    y.backward(sg.shard(dy, stored, mesh))
    x.requires_grad_()
    expected = plain(x)
    expected.backward(dy)
    assert local.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(sg.unshard(y, stored, mesh), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sg.unshard(local.grad, stored, mesh), x.grad, rtol=1e-11, atol=1e-12)
    assert_gradients_match(sharded, plain)


@distributed(world_size=2)
def test_a_norm_reduces_both_gradients_at_once_and_only_where_rows_are_cut(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for sequence_dim, expected in ((0, [2 * 6 * 4]), (None, [])):
        norm = sg.LayerNorm(6, mesh=mesh, sequence_dim=sequence_dim)
        with sg.trace_collectives() as traced:
            norm(torch.randn(3, 6)).sum().backward()
        assert [event.bytes for event in traced] == expected
    with pytest.raises(sg.ShapeError, match="is not a row dim"):
        sg.LayerNorm(6, mesh=mesh, sequence_dim=-1)(torch.randn(3, 6))
