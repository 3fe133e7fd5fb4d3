"""What exact mode cannot promise is refused, before anything is computed or sent; what rounds safely is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bits import Meshes, normal
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import shardgrad as sg
from shardgrad.comm.mesh import view
from shardgrad.comm.pieces import exact
from shardgrad.ops.pieces import per_piece
from shardgrad.testing import distributed

COLUMN = "X[n,d] W[d,m/tp] -> Y[n,m/tp]"
ROW = "X[n,d/tp] W[d/tp,m] -> Y[n,m]"


def mesh_of(*grid: int, names: tuple[str, ...] = ("tp",)) -> DeviceMesh:
    return init_device_mesh("cpu", grid, mesh_dim_names=names)


@distributed(world_size=2)
def test_pieces_that_ranks_do_not_divide_and_axes_that_are_not_there(world_size: int) -> None:
    mesh = mesh_of(2)
    for pieces, error, said in [
        (3, sg.MeshError, "2 ranks, which do not divide 3 pieces"),
        (1, sg.MeshError, "2 ranks, which do not divide 1 pieces"),
        ({"tp": 7}, sg.MeshError, "Take a multiple of 2"),
        ({"dp": 2}, sg.MeshError, "dp"),
        ({"tp": 2.0}, TypeError, "are a whole number"),
        ({"tp": True}, TypeError, "are a whole number"),
        ({"tp": 0}, TypeError, "are a whole number"),
        ("tp", TypeError, "takes pieces by axis"),
    ]:
        with pytest.raises(error, match=said):
            sg.set_exact(mesh, pieces)  # type: ignore[arg-type]
        assert exact(view(mesh)) is None
    sg.set_exact(mesh, {})
    assert exact(view(mesh)) == {"tp": 2}
    sg.set_exact(mesh, None)
    assert exact(view(mesh)) is None


@distributed(world_size=2)
def test_sizes_that_pieces_do_not_divide(world_size: int) -> None:
    mesh = mesh_of(2)
    sg.set_exact(mesh, 4)
    with sg.trace_collectives() as traced:
        for text, x, w, said in [
            (COLUMN, (3, 5), (5, 3), "m/tp on this rank = 3 is not 2 equal pieces"),
            (ROW, (3, 3), (3, 4), "d/tp on this rank = 3 is not 2 equal pieces"),
            ("X[n/tp,d] W[d,m] -> Y[n/tp,m]", (5, 3), (3, 4), "n/tp on this rank = 5 is not 2 equal pieces"),
        ]:
            with pytest.raises(sg.ShapeError, match=said):
                sg.matmul(normal(*x, seed=1), normal(*w, seed=2), text, mesh)
    assert all(event.bytes < 1000 for event in traced)  # what ranks compare


@distributed(world_size=2, timeout=20)
def test_sizes_that_are_wrong_on_some_ranks_only(world_size: int, rank: int) -> None:
    """Pieces divide the 4 of rank 1, not the 5 of rank 0: all ranks must say so, or one waits for the others."""
    mesh = mesh_of(2)
    sg.set_exact(mesh, 4)
    x, w = normal(3, 9, seed=1), normal(9, 4, seed=2)
    layout = sg.Layout(ROW)
    local = sg.shard(x, layout.lhs, mesh), sg.shard(w, layout.rhs, mesh)
    assert local[0].shape[1] % 2 == (rank == 0)
    with pytest.raises(sg.DisagreementError, match="d/tp = 5"):
        sg.matmul(*local, layout, mesh)
    with pytest.raises(sg.ShapeError, match="d = 9 is not 4 equal pieces"):
        sg.matmul(*local, layout, mesh, sizes={"d": 9})
    with pytest.raises(sg.ShapeError, match="= 9 is not 4 equal pieces"):
        sg.RowParallelLinear(9, 4, mesh=mesh)(local[0])


@distributed(world_size=2)
def test_overlap_is_refused_before_and_after(world_size: int) -> None:
    mesh = mesh_of(2)
    sg.set_overlap(mesh, 2)
    with pytest.raises(ValueError, match="overlap is set"):
        sg.set_exact(mesh, 4)
    sg.set_overlap(mesh, None)
    sg.set_exact(mesh, 4)
    with pytest.raises(ValueError, match="set_exact is set"):
        sg.set_overlap(mesh, 2)
    sg.set_exact(mesh, None)
    sg.set_overlap(mesh, 2)


@distributed(world_size=2)
def test_sums_that_are_left_to_the_caller(world_size: int) -> None:
    mesh = mesh_of(2)
    for pieces in (2, 4):  # with a piece a rank, too: how the caller adds is not known
        sg.set_exact(mesh, pieces)
        for text in (
            "X[n,d/tp] W[d/tp,m] -> Y[n,m]{tp}",
            "X[n/tp,d] W[d,m]{tp} -> Y[n/tp,m]",
            "X[n,d]{tp} W[d,m/tp] -> Y[n,m/tp]",
        ):
            with pytest.raises(sg.LayoutError, match="leave out the mark"):
                sg.matmul(normal(4, 8, seed=1), normal(8, 4, seed=2), text, mesh)


@distributed(world_size=2)
def test_collectives_that_the_program_calls_itself(world_size: int) -> None:
    mesh, x = mesh_of(2), normal(4, 4, seed=1)
    for pieces in (2, 4):
        sg.set_exact(mesh, pieces)
        calls: list[Callable[..., Tensor]] = [sg.replicate, sg.all_reduce, sg.all_gather, sg.reduce_scatter]
        for call in calls:
            with pytest.raises(sg.LayoutError, match=f"sg.{call.__name__} or its gradient cannot be exact"):
                call(x, mesh, "tp")
    assert sg.gather_replicated(x, mesh, "tp").shape == (8, 4)  # moves only
    assert sg.slice_replicated(x, mesh, "tp").shape == (2, 4)


@distributed(world_size=4)
def test_shards_that_are_handed_to_others(world_size: int) -> None:
    """Looked at where they are gathered; what is done to the whole is not, on any number of ranks."""
    meshes = Meshes({"tp": 4})

    def between(mesh: DeviceMesh, act: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        w = sg.shard(normal(7, 12, seed=2), "W[d,m/tp]", mesh)
        h = act(sg.matmul(normal(5, 7, seed=1).requires_grad_(), w, COLUMN, mesh))
        whole = sg.gather_replicated(h, mesh, dim=1, size=12)
        mine = sg.slice_replicated(F.silu(whole.softmax(1)), mesh, dim=1)
        return {"Y": sg.matmul(mine, sg.shard(normal(12, 5, seed=3), "W[d/tp,m]", mesh), ROW, mesh), "whole": whole}

    meshes.run("tanh", lambda mesh: between(mesh, torch.tanh))
    meshes.run("silu", lambda mesh: between(mesh, F.silu))
    meshes.run("softmax", lambda mesh: between(mesh, lambda h: h.softmax(1)))
    meshes.assert_same(refused=2)


@distributed(world_size=1)
def test_graphs_of_the_compiler(world_size: int) -> None:
    mesh = mesh_of(1)
    sg.set_exact(mesh, 4)
    layer = sg.ColumnParallelLinear(3, 8, mesh=mesh)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="exact mode"):
        compiled(normal(4, 3, seed=1))
    layer(normal(4, 3, seed=1))


UNSAFE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "a chain": lambda x: (F.silu(x) * 2 + x).relu(),
}


@distributed(world_size=2)
@pytest.mark.parametrize("name", UNSAFE)
def test_functions_that_round_by_the_number_of_elements(world_size: int, name: str) -> None:
    act = UNSAFE[name]
    mesh = mesh_of(2)
    for pieces, rows, refused in [(4, 5, True), (2, 5, True), (4, 64, False)]:
        sg.set_exact(mesh, pieces)
        up, down = sg.ColumnParallelLinear(3, 4, mesh=mesh), sg.RowParallelLinear(4, 3, mesh=mesh)
        norm = sg.LayerNorm(4, mesh=mesh, sequence_dim=0)
        h = up(normal(rows, 3, seed=1))
        if refused:
            with pytest.raises(sg.LayoutError, match=r"sg.per_piece\(function\)\(x\)"):
                down(act(h))
            with pytest.raises(sg.LayoutError, match=r"sg.per_piece\(function\)\(x\)"):
                sg.matmul(act(h), normal(2, 3, seed=2), ROW, mesh)
            with pytest.raises(sg.LayoutError, match=r"sg.per_piece\(function\)\(x\)"):
                norm(act(normal(2 * rows, 4, seed=3).requires_grad_()))
        else:
            down(act(h))
        down(per_piece(act)(h)).sum().backward()
        down(torch.tanh(h) * 2 - h)
        up(act(normal(rows, 3, seed=1).requires_grad_()))  # alike on all ranks, however many


class OfRows(torch.autograd.Function):
    """A function of somebody's, of which nothing is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 3


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "softmax of a shard": (lambda h, g: h.softmax(-1), "SoftmaxBackward0, which is not known"),
    "a norm of a shard": (lambda h, g: F.layer_norm(h, h.shape[-1:]), "NativeLayerNormBackward0, which is not known"),
    "a mean taken off": (lambda h, g: h - h.mean(-1, keepdim=True), "SubBackward0 of a smaller tensor"),
    "a running sum": (lambda h, g: h.cumsum(0), "CumsumBackward0, which is not known"),
    "a product by hand": (lambda h, g: normal(64, 64, seed=3) @ h, "MmBackward0, which is not known"),
    "somebody's function": (lambda h, g: OfRows.apply(h), r"OfRowsBackward, .* sg.per_piece\(function\)\(x\)"),
    "a parameter of columns": (lambda h, g: h * g, "MulBackward0 of a smaller tensor"),
    "one that is expanded": (lambda h, g: h + g.expand(h.shape), "ExpandBackward0 of a smaller tensor"),
    "softmax in per_piece": (
        lambda h, g: per_piece(lambda x: x.softmax(-1))(h),
        "SoftmaxBackward0, which is not known",
    ),
    "a parameter in per_piece": (lambda h, g: per_piece(lambda x: x * g[0])(h), "MulBackward0 of a smaller tensor"),
    "one before per_piece": (lambda h, g: per_piece(torch.mul)(h, g.expand(h.shape)), "ExpandBackward0 of a smaller"),
}


@distributed(world_size=2)
@pytest.mark.parametrize("name", REFUSED)
def test_functions_that_are_not_of_each_element(world_size: int, name: str) -> None:
    """Also where a piece is a whole number of vectors."""
    function, said = REFUSED[name]
    mesh = mesh_of(2)
    up, down = sg.ColumnParallelLinear(3, 12, mesh=mesh), sg.RowParallelLinear(12, 3, mesh=mesh)
    gain = normal(6, seed=2).requires_grad_()
    down(function(up(normal(64, 3, seed=1)), gain))
    sg.set_exact(mesh, 4)
    with pytest.raises(sg.LayoutError, match=said):
        down(function(up(normal(64, 3, seed=1)), gain))
    down(per_piece(OfRows.apply)(up(normal(64, 3, seed=1))) * gain.detach())


LAST_ONES: list[tuple[Callable[[Tensor], Tensor], torch.dtype, int, str]] = [
    (lambda h: torch.add(h, h, alpha=0.3), torch.bfloat16, 5, "AddBackward0"),
    (lambda h: torch.sub(h, h, alpha=0.3), torch.float16, 5, "SubBackward0"),
    (lambda h: torch.add(h, 0.7, alpha=0.3), torch.float32, 5, "AddBackward0"),
    (F.gelu, torch.float16, 32, "GeluBackward0"),
    (lambda h: (h.abs() + 0.1) ** -0.5, torch.bfloat16, 32, "PowBackward0"),
]


@distributed(world_size=4)
@pytest.mark.parametrize("case", range(len(LAST_ONES)))
def test_what_rounds_the_last_elements_otherwise_in_some_dtypes(world_size: int, case: int) -> None:
    """Refused, or given to `per_piece` with the same bits; pieces of 5 or 32 rows × 3 elements."""
    function, dtype, rows, said = LAST_ONES[case]
    meshes = Meshes({"tp": 4})

    def between(mesh: DeviceMesh, act: Callable[..., Tensor]) -> dict[str, Tensor]:
        w = sg.shard(normal(7, 12, seed=2, dtype=dtype), "W[d,m/tp]", mesh)
        h = sg.matmul(normal(rows, 7, seed=1, dtype=dtype).requires_grad_(), w, COLUMN, mesh)
        return {"Y": sg.matmul(act(h), sg.shard(normal(12, 5, seed=3, dtype=dtype), "W[d/tp,m]", mesh), ROW, mesh)}

    meshes.run("in per_piece", lambda mesh: between(mesh, per_piece(function)))
    meshes.run("refused", lambda mesh: between(mesh, function))
    meshes.assert_same(refused=1)
    for mesh in meshes.mine.values():
        with pytest.raises(sg.LayoutError, match=said):
            between(mesh, function)


@pytest.mark.parametrize("function", [F.silu, F.gelu, torch.sigmoid, F.softplus])
def test_per_piece_gives_bits_that_do_not_depend_on_how_many_there_are(function: Callable[..., Tensor]) -> None:
    whole = normal(1 << 16, seed=1)
    dy = normal(1 << 16, seed=2)
    x = whole.clone().requires_grad_()
    function(x).backward(dy)
    expected, grad = function(whole), x.grad
    assert grad is not None
    for first, size in [(0, 1), (5, 3), (64, 31), (1, 33), (7, 1000), (3, 1 << 15), (0, 1 << 16)]:
        part = whole[first : first + size].clone().requires_grad_()
        made = per_piece(function)(part)
        made.backward(dy[first : first + size])
        assert part.grad is not None
        assert torch.equal(made, expected[first : first + size])
        assert torch.equal(part.grad, grad[first : first + size])


def test_per_piece_of_several_tensors_and_of_none() -> None:
    gated = per_piece(lambda g, u: F.silu(g) * u)
    g, u = normal(3, 5, 7, seed=1).requires_grad_(), normal(3, 5, 7, seed=2).transpose(0, 2).contiguous()
    with pytest.raises(sg.LayoutError, match="expand what is broadcast"):
        gated(g, u)
    u = u.transpose(0, 2).requires_grad_()
    y = gated(g, u)
    assert y.shape == (3, 5, 7)
    y.sum().backward()
    torch.testing.assert_close(u.grad, F.silu(g.detach()))
    assert gated(g[:0], u[:0]).shape == (0, 5, 7)


@distributed(world_size=2)
def test_ranks_that_set_it_differently(world_size: int, rank: int) -> None:
    mesh = mesh_of(2)
    with pytest.raises(sg.DisagreementError, match="pieces"):
        sg.set_exact(mesh, [4, 8][rank])
    torch.set_num_threads(1 + rank)
    try:
        with pytest.raises(sg.DisagreementError, match="threads"):
            sg.set_exact(mesh, 4)
    finally:
        torch.set_num_threads(1)
    assert exact(view(mesh)) is None
    sg.set_exact(mesh, 4)
    if rank == 0:
        sg.set_exact(mesh, None)
    with pytest.raises(sg.DisagreementError, match="pieces"):
        sg.matmul(normal(4, 4, seed=1), normal(4, 4, seed=2), ROW, mesh)


@distributed(world_size=2)
def test_a_slice_of_the_mesh_that_it_was_set_on(world_size: int) -> None:
    mesh = mesh_of(1, 2, names=("dp", "tp"))
    tp, x = mesh["tp"], normal(5, 8, seed=1)
    layer = sg.RowParallelLinear(16, 3, mesh=tp)
    layer(x)
    said = r"a mesh of which this one \(tp\) is a slice, .* call sg.set_exact on the slice as well"
    with pytest.raises(sg.LayoutError, match=said):
        sg.set_exact(mesh, 4)
    sg.set_exact(tp, 4)
    sg.set_exact(mesh, 4)
    layer(x)
    with pytest.raises(sg.LayoutError, match=said):
        sg.RowParallelLinear(16, 3, mesh=mesh["tp"])(x)
    sg.set_exact(mesh, None)
    sg.set_exact(tp, None)
    layer(x)


@distributed(world_size=2)
def test_threads_that_change_later(world_size: int) -> None:
    mesh = mesh_of(2)
    sg.set_exact(mesh, 4)
    layer, x = sg.ColumnParallelLinear(3, 8, mesh=mesh), normal(5, 3, seed=1)
    layer(x)
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="this rank has 2 threads, but bits are those of 1"):
            layer(x)
    finally:
        torch.set_num_threads(1)
    layer(x)


@distributed(world_size=2)
def test_wrappers_that_sum_gradients_by_themselves(world_size: int) -> None:
    mesh = mesh_of(2, 1, names=("dp", "tp"))
    sg.set_exact(mesh, {"tp": 4})
    x = normal(4, 8, seed=1)
    wraps: list[Callable[[nn.Module], Any]] = [
        DistributedDataParallel,
        lambda model: fully_shard(model, mesh=mesh["dp"]),
    ]
    for wrap in wraps:
        model = nn.Sequential(sg.ColumnParallelLinear(8, 8, mesh=mesh), sg.RowParallelLinear(8, 8, mesh=mesh))
        with pytest.raises(sg.LayoutError, match=r"give layers the axis \(data=sg.BatchAxis\('dp'\)\)"):
            wrap(model)(x).sum().backward()


@distributed(world_size=2)
def test_mixtures_of_experts(world_size: int) -> None:
    mesh = mesh_of(2, names=("ep",))
    sg.set_exact(mesh, 4)
    moe = sg.MoE(8, 8, 4, 2, mesh=mesh)
    with pytest.raises(sg.LayoutError, match="exact"):
        moe(normal(4, 8, seed=1))


@distributed(world_size=2)
def test_blocks_that_share_a_reduction(world_size: int) -> None:
    mesh = mesh_of(2)
    sg.set_exact(mesh, 4)
    block = sg.ParallelBlock(
        sg.LayerNorm(8, mesh=mesh), sg.Attention(8, 4, mesh=mesh, reduce=False), sg.MLP(8, 8, mesh=mesh, reduce=False)
    )
    with pytest.raises(sg.LayoutError, match="exact"):
        block(normal(2, 4, 8, seed=1))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 8), nn.LayerNorm(2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(self.norm(h.unflatten(-1, (-1, 2))).flatten(-2))


@distributed(world_size=2)
def test_models_of_others(world_size: int) -> None:
    """A norm between sharded layers, whose weight's gradient is a sum over ranks."""
    mesh = mesh_of(2)
    sg.set_exact(mesh, 4)
    plan = {"up": "colwise", "down": "rowwise"}
    model = sg.parallelize(Plain(), mesh, plan=plan)
    with pytest.raises(sg.LayoutError, match="exact"):
        model(normal(3, 8, seed=1))


@distributed(world_size=4)
def test_refusals_are_alike_on_every_mesh(world_size: int) -> None:
    meshes = Meshes({"tp": 4})

    def refused(mesh: DeviceMesh) -> dict[str, Tensor]:
        up = sg.ColumnParallelLinear(3, 20, mesh=mesh)
        down = sg.RowParallelLinear(20, 3, mesh=mesh)
        return {"y": down(F.silu(up(normal(5, 3, seed=1))))}

    meshes.run("silu", refused)
    meshes.run("head", lambda mesh: {"y": sg.Attention(12, 6, mesh=mesh)(normal(2, 3, 12, seed=1))})
    meshes.assert_same(refused=2)


OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], torch.dtype, str]] = [
    (torch.optim.Muon, torch.float32, "Muon sums over a parameter"),
    (torch.optim.SGD, torch.bfloat16, "SGD rounds the last elements of a 16-bit parameter"),
    (torch.optim.SGD, torch.float32, ""),
    (torch.optim.AdamW, torch.bfloat16, ""),
]


@distributed(world_size=2)
@pytest.mark.parametrize(("kind", "dtype", "said"), OPTIMIZERS)
def test_optimizers_whose_step_depends_on_the_shards(
    world_size: int, kind: type[torch.optim.Optimizer], dtype: torch.dtype, said: str
) -> None:
    mesh = mesh_of(2)
    layer = sg.ColumnParallelLinear(6, 12, bias=False, mesh=mesh, dtype=dtype)
    optimizer = kind(layer.parameters(), lr=0.1)  # type: ignore[call-arg]
    sg.set_exact(mesh, 4)
    layer(torch.randn(3, 6, dtype=dtype)).sum().backward()
    if said:
        with pytest.raises(sg.LayoutError, match=said):
            optimizer.step()
        sg.set_exact(mesh, None)
    optimizer.step()
