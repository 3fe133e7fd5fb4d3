"""One table for input and output embeddings, and learned positions, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain import randn, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardgrad as sg
from shardgrad.testing import distributed

D = torch.float64
BATCH, SEQUENCE, VOCAB, WIDTH = 2, 5, 11, 3


class Tied(nn.Module):
    """Logits of embedded tokens and their positions, by the embedding's own table."""

    def __init__(self, mesh: DeviceMesh, sequence_dim: int | None, by_parameter: bool) -> None:
        super().__init__()
        self.embedding = sg.VocabParallelEmbedding(VOCAB, WIDTH, mesh=mesh, sequence_dim=sequence_dim, dtype=D)
        self.positions = sg.LearnedPositions(9, WIDTH, mesh=mesh, sequence_dim=sequence_dim, dtype=D)
        self.head = None
        if by_parameter:
            self.head = sg.ColumnParallelLinear(WIDTH, VOCAB, False, mesh=mesh, sequence_dim=sequence_dim, dtype=D)
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.sin(self.embedding(ids) + self.positions(ids.shape[1], 2))
        return self.embedding.logits(x, ids.shape[1]) if self.head is None else self.head(x, ids.shape[1])


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("sequence_dim", [None, 1])
@pytest.mark.parametrize("by_parameter", [False, True])
def test_both_uses_of_one_table_add_up(world_size: int, sequence_dim: int | None, by_parameter: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    torch.manual_seed(1)
    model = Tied(mesh, sequence_dim, by_parameter)
    ids = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(3))
    table, rows = (
        whole(p, how).requires_grad_() for _, p, how in sg.named_shardings(model)
    )  # the table is listed once
    dy = randn(BATCH, SEQUENCE, VOCAB, seed=4)
    logits = model.embedding.logits_layout(3)["L"]
    y = model(ids)
    y.backward(sg.shard(dy, logits, mesh))
    expected = F.linear(torch.sin(F.embedding(ids, table) + rows[2 : 2 + SEQUENCE]), table)
    expected.backward(dy)
    torch.testing.assert_close(sg.unshard(y.detach(), logits, mesh), expected.detach(), rtol=1e-12, atol=1e-13)
    for (name, parameter, how), right in zip(sg.named_shardings(model), (table, rows)):
        assert parameter.grad is not None
        torch.testing.assert_close(whole(parameter.grad, how), right.grad, rtol=1e-11, atol=1e-13, msg=name)

    assert sg.num_parameters(model) == table.numel() + rows.numel()
    norm = nn.utils.clip_grad_norm_([table, rows], 1.0)
    torch.testing.assert_close(sg.clip_grad_norm_(model, 1.0), norm, rtol=1e-12, atol=0)
    state = sg.state_dict(model)
    assert set(state) == {"embedding.weight", "positions.weight"} | ({"head.weight"} if by_parameter else set())
    other = Tied(mesh, sequence_dim, by_parameter)
    sg.load_state_dict(other, {name: 2 * tensor for name, tensor in state.items()})
    assert torch.equal(other.embedding.weight, 2 * model.embedding.weight)
    if other.head is not None:
        assert other.head.weight is other.embedding.weight


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("sequence_dim", [None, 1])
def test_lookups_logits_and_positions_send_what_they_predict(world_size: int, sequence_dim: int | None) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    model = Tied(mesh, sequence_dim, False)
    ids = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(3))
    for _ in range(2):  # in the first call, ranks also compare what they see for the first time
        with sg.trace_collectives() as traced:
            model(ids).sum().backward()
    sizes = {"b": BATCH, "s": SEQUENCE, "v": VOCAB, "m": WIDTH}
    predicted = [
        *model.embedding.collectives((BATCH, SEQUENCE), D),
        *model.positions.collectives((BATCH, SEQUENCE, WIDTH), D),
        *model.embedding.logits_layout(3).collectives(
            sizes, {"tp": world_size}, D, coordinate={"tp": mesh.get_local_rank()}
        ),
    ]
    assert sorted((c.operation, c.axis, c.bytes) for c in predicted) == sorted(
        (event.operation, event.axis, event.bytes) for event in traced
    )
    assert bool(predicted) == (world_size > 1)


@distributed(world_size=2)
def test_positions_that_are_not_there_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    positions = sg.LearnedPositions(9, WIDTH, mesh=mesh)
    assert positions(9).shape == (9, WIDTH)
    with pytest.raises(sg.ShapeError, match=r"positions 5 to 9 are needed, of 9"):
        positions(5, 5)
    with pytest.raises(sg.ShapeError, match=r"sequence_dim is 1 or None, not 0"):
        sg.LearnedPositions(9, WIDTH, mesh=mesh, sequence_dim=0)
