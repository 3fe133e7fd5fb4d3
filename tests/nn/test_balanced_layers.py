"""Layers on balanced axes against one device in float64, and their state on meshes that shard otherwise.

On 2 ranks torch.chunk is balanced itself; on 3, what differs are sizes of 3 n + 1.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from plain import assert_gradients_match, load_from, randn, whole
from test_attention import GROUPED, attention
from test_attention import check as check_attention
from test_compile import tp
from test_moe import TOKENS
from test_moe import run as run_moe
from test_state import Model, assert_same_state, filled
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shardgrad as sg
from shardgrad import checkpoint
from shardgrad.comm.mesh import view
from shardgrad.layout.notation import Dim
from shardgrad.layout.sizes import chunks
from shardgrad.nn.dtensors import pieces
from shardgrad.nn.rotary import Rotary
from shardgrad.testing import distributed

D = torch.float64


def balanced(*grid: int, names: tuple[str, ...] = ("tp",), axes: str | None = None) -> DeviceMesh:
    mesh = init_device_mesh("cpu", grid, mesh_dim_names=names)
    sg.set_balanced(mesh, axes)
    return mesh


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 7), *GROUPED])
def test_attention_has_its_heads_and_the_kv_heads_that_they_attend(world_size: int, heads: int, kv_heads: int) -> None:
    mesh = balanced(world_size)
    odd = heads % 4 == 2
    rotary = Rotary(4, base=50.0) if odd else None
    layer = attention(mesh, heads, 1 if odd else None, num_kv_heads=kv_heads, head_dim=4, bias=heads < 8, rotary=rotary)
    here = mesh.get_local_rank("tp")
    assert layer.heads.count == heads // world_size + (here < heads % world_size)
    check_attention(layer, mesh)


@distributed(world_size=[2, 3])
def test_attention_sends_what_it_says(world_size: int) -> None:
    mesh = balanced(world_size)
    for heads, kv_heads, sequence_dim in ((7, 7, 1), (10, 5, None), (4, 2, 1)):
        layer = attention(mesh, heads, sequence_dim, num_kv_heads=kv_heads, head_dim=4)
        x = sg.shard(randn(2, 7, 12, seed=1), layer.input_layouts[0]["X"], mesh).requires_grad_()
        layer(x, 7).sum().backward()
        with sg.trace_collectives() as traced:
            layer(x, 7).sum().backward()
        said = sorted((one.operation, one.axis, one.bytes) for one in layer.collectives(2, 7, D))
        assert sorted((event.operation, event.axis, event.bytes) for event in traced) == said


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("experts", [4, 7])
def test_experts(world_size: int, experts: int) -> None:
    mesh = balanced(world_size, names=("ep",))
    for top_k, gated in ((2, True), (1, False)):
        layer = sg.MoE(6, 7, experts, top_k, mesh=mesh, gated=gated, dtype=D)
        assert layer.up.shape[0] == chunks(experts, sg.Balanced(world_size))[mesh.get_local_rank("ep")]
        run_moe(layer, world_size, TOKENS[:world_size])


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("vocabulary", [2, 4, 7])
def test_a_language_models_ends(world_size: int, vocabulary: int) -> None:
    """Embedding, products both ways with the sequence sharded, norm, tied head and loss."""
    mesh = balanced(world_size)
    own = {"mesh": mesh, "dtype": D}
    torch.manual_seed(1)
    sharded = nn.ModuleDict(
        {
            "embedding": sg.VocabParallelEmbedding(vocabulary, 6, sequence_dim=1, **own),
            "norm": sg.LayerNorm(6, sequence_dim=1, **own),
            "up": sg.ColumnParallelLinear(6, 7, sequence_dim=1, **own),
            "down": sg.RowParallelLinear(7, 6, sequence_dim=1, **own),
            "head": sg.ColumnParallelLinear(6, vocabulary, bias=False, sequence_dim=1, **own),
        }
    )
    plain = nn.ModuleDict(
        {
            "embedding": nn.Embedding(vocabulary, 6, dtype=D),
            "norm": nn.LayerNorm(6, dtype=D),
            "up": nn.Linear(6, 7, dtype=D),
            "down": nn.Linear(7, 6, dtype=D),
            "head": nn.Linear(6, vocabulary, bias=False, dtype=D),
        }
    )
    load_from(plain, sharded)
    for model in (sharded, plain):
        model["head"].weight = model["embedding"].weight
    ids = torch.randint(0, vocabulary, (2, 5), generator=torch.Generator().manual_seed(2))
    target = torch.randint(0, vocabulary, (2, 5), generator=torch.Generator().manual_seed(3))

    def logits(model: nn.ModuleDict) -> torch.Tensor:
        x = model["norm"](model["embedding"](ids))
        return model["head"](x + model["down"](F.gelu(model["up"](x))))

    loss = sg.vocab_parallel_cross_entropy(logits(sharded), target, vocab_size=vocabulary, mesh=mesh)
    expected = F.cross_entropy(logits(plain).flatten(0, 1), target.flatten())
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    assert_gradients_match(sharded, plain)


@distributed(world_size=[2, 3, 4])
def test_state_and_checkpoints_are_those_of_any_mesh(world_size: int, tmp_path: Path) -> None:
    expected = filled(1).state_dict()
    grids = [(1, world_size), (world_size, 1)] + [(2, 2)] * (world_size == 4)
    made = [balanced(*grid, names=("dp", "tp")) for grid in grids]
    other = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp"))
    folder = tmp_path
    for at, mesh in enumerate(made):
        model, plain = Model(mesh), Model(other)
        sg.load_state_dict(model, expected)
        assert_same_state(sg.state_dict(model), expected)
        sizes = chunks(11, sg.Balanced(mesh.size(1)))
        assert model.embedding.weight.shape[0] == sizes[mesh.get_local_rank("tp")]  # type: ignore[union-attr]
        checkpoint.save(folder / str(at), model, mesh=mesh)
        checkpoint.load(folder / str(at), plain)
        assert_same_state(sg.state_dict(plain), expected)
        sg.load_state_dict(model, filled(2).state_dict())
        checkpoint.load(folder / str(at), model)
        assert_same_state(sg.state_dict(model), expected)


@distributed(world_size=[2, 3, 4])
def test_dtensors_at_the_border(world_size: int, tmp_path: Path) -> None:
    """What torch.chunk shards alike becomes a DTensor; what it does not is told; what comes as one is converted."""
    mesh = balanced(world_size)
    whole_weight = randn(2 * world_size + 1, 3, seed=1)
    alike = chunks(2 * world_size + 1, world_size) == chunks(2 * world_size + 1, sg.Balanced(world_size))
    assert alike is (world_size == 2)
    layer = sg.ColumnParallelLinear(3, 2 * world_size + 1, bias=False, mesh=mesh, dtype=D)
    sg.load_state_dict(layer, {"weight": whole_weight})
    if alike:
        state = sg.state_dict(layer, as_dtensor=True)
        assert torch.equal(state["weight"].full_tensor(), whole_weight)
    else:
        with pytest.raises(sg.LayoutError, match=r"balanced shards .*DTensor's are torch.chunk's: take global tensors"):
            sg.state_dict(layer, as_dtensor=True)
    even = sg.ColumnParallelLinear(3, 2 * world_size, mesh=mesh, dtype=D)
    state = sg.state_dict(even, as_dtensor=True)
    assert all(isinstance(one, DTensor) and one.placements == (Shard(0),) for one in state.values())
    folder = str(tmp_path)
    dcp.save(state, checkpoint_id=folder)
    dcp.load(state, checkpoint_id=folder)
    theirs = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    source = sg.ColumnParallelLinear(3, 2 * world_size + 1, bias=False, mesh=theirs, dtype=D)
    sg.load_state_dict(source, {"weight": whole_weight})
    with torch.no_grad():
        layer.weight.zero_()
    sg.load_state_dict(layer, sg.state_dict(source, as_dtensor=True))
    assert torch.equal(whole(layer.weight, layer.shardings()["weight"]), whole_weight)


@distributed(world_size=3)
@pytest.mark.parametrize("grid", [(3, 1), (1, 3)])
def test_fully_sharded_data_parallelism_on_balanced_axes(grid: tuple[int, int]) -> None:
    mesh = balanced(*grid, names=("dp", "tp"))
    torch.manual_seed(4)
    data = sg.BatchAxis("dp", shard_params=True)
    layer = sg.RowParallelLinear(7, 4, mesh=mesh, data=data, dtype=D)
    plain = load_from(nn.Linear(7, 4, dtype=D), layer)
    x, dy = randn(10, 7, seed=5), randn(10, 4, seed=6)
    made = layer.layouts(2)[0]
    local = sg.shard(x, made["X"], mesh).requires_grad_()
    y = layer(local)
    y.backward(sg.shard(dy, made["Y"], mesh))
    x.requires_grad_()
    expected = plain(x)
    expected.backward(dy)
    torch.testing.assert_close(sg.unshard(y.detach(), made["Y"], mesh), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sg.unshard(local.grad, made["X"], mesh), x.grad, rtol=1e-12, atol=1e-12)
    assert_gradients_match(layer, plain)


@distributed(world_size=3)
def test_torchs_own_shards_stay_torch_chunks(world_size: int) -> None:
    """Of a DTensor (FSDP2's) over a balanced axis: its place in a concatenation."""
    mesh = balanced(3)
    full = randn(4, 3, seed=1)
    spec = sg.TensorSpec("W", (Dim("a"), Dim("b")))
    part = sg.ParamSharding(spec, (2, 3), mesh)
    joined = sg.ParamSharding(spec, (4, 3), mesh, parts=(part, part))
    here = torch.cat([one for one, _ in pieces(distribute_tensor(full, mesh, [Shard(0)]), joined)])
    right = torch.zeros_like(full)
    place = slice(2 * mesh.get_rank(), 2 * mesh.get_rank() + 2)  # 2, 2, 0 rows
    right[place] = full[place]
    assert torch.equal(here, right)


@pytest.mark.slow
@distributed(world_size=3)
def test_under_torch_compile(world_size: int) -> None:
    mesh = tp(world_size)
    sg.set_balanced(mesh)
    layer = sg.ColumnParallelLinear(3, 7, mesh=mesh, dtype=D, gather_output=True)
    x = randn(4, 3, seed=1)

    def call(x: torch.Tensor) -> torch.Tensor:
        y = layer(x)
        return y + sg.gather_replicated(sg.slice_replicated(y, mesh, dim=1), mesh, dim=1, size=7)

    expected = torch.autograd.grad(call(x).square().sum(), list(layer.parameters()))
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters()))
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-13, atol=1e-13)


def in_turns(world_size: int) -> list[DeviceMesh]:
    """Meshes that are equal to torch, and shard in turns as torch.chunk and balanced."""
    made = [init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)) for _ in range(4)]
    for mesh in made[1::2]:
        sg.set_balanced(mesh)
    return made


@distributed(world_size=[2, 3])
@pytest.mark.parametrize(
    "text",
    [
        "X[n,d] W[f/tp,d] -> Y[n,f/tp]",
        "X[n,f/tp] W[d,f/tp] -> Y[n/tp,d]",
        "X[n/tp,d] W[f/tp,d] -> Y[n,f/tp]",
    ],
)
def test_one_layout_and_sizes_on_meshes_that_shard_otherwise(world_size: int, text: str) -> None:
    """Nothing that is remembered of one mesh is taken for the other, though the numbers of their ranks are equal."""
    layout, sizes = sg.Layout(text), {"n": 4, "d": 5, "f": 10}
    x, w = (randn(*[sizes[a] for a in spec.letters], seed=at) for at, spec in enumerate((layout.lhs, layout.rhs)))
    plain = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    y = F.linear(*plain)
    dy = randn(*y.shape, seed=3)
    y.backward(dy)
    for mesh in in_turns(world_size):
        mine = [sg.shard(one, spec, mesh).requires_grad_() for one, spec in zip((x, w), (layout.lhs, layout.rhs))]
        found = sg.matmul(*mine, layout, mesh, sizes=sizes)
        with sg.trace_collectives() as traced:
            sg.matmul(*mine, layout, mesh, sizes=sizes).backward(sg.shard(dy, layout.out, mesh))
        torch.testing.assert_close(found.detach(), sg.shard(y.detach(), layout.out, mesh), rtol=1e-12, atol=1e-12)
        for one, right, spec in zip(mine, plain, (layout.lhs, layout.rhs)):
            assert one.grad is not None
            assert right.grad is not None
            torch.testing.assert_close(one.grad, sg.shard(right.grad, spec, mesh), rtol=1e-12, atol=1e-12)
        here = view(mesh)
        said = layout.collectives(sizes, here.shape, D, coordinate=here.coordinate)
        sent = sorted((event.operation, event.axis, event.bytes) for event in traced)
        assert sent == sorted((one.operation, one.axis, one.bytes) for one in said)
        sg.check_product(layout, sizes, mesh, dtype=D).require()


@distributed(world_size=3)
def test_heads_and_statistics_on_meshes_that_shard_otherwise(world_size: int) -> None:
    layout = sg.Layout("X[n,d] W[v/tp,d] -> Z[n,v/tp]")
    x, w, target = randn(7, 5, seed=1), randn(10, 5, seed=2), torch.arange(7)
    plain = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    logits = F.linear(*plain)
    expected = F.cross_entropy(logits, target)
    expected.backward()
    for mesh in in_turns(world_size):
        mine = [x.clone().requires_grad_(), sg.shard(w, layout.rhs, mesh).requires_grad_()]
        loss = sg.linear_cross_entropy(*mine, target, layout, mesh, vocab_size=10, chunk_tokens=3)
        loss.backward()
        part = sg.shard(logits.detach(), layout.out, mesh)
        entropy = sg.VocabParallelLogits(part, vocab_size=10, mesh=mesh).entropy()
        right = [expected.detach(), torch.distributions.Categorical(logits=logits.detach()).entropy()]
        torch.testing.assert_close([loss.detach(), entropy], right, rtol=1e-12, atol=1e-12)
        for one, whole_one, spec in zip(mine, plain, (layout.lhs, layout.rhs)):
            assert one.grad is not None
            assert whole_one.grad is not None
            torch.testing.assert_close(one.grad, sg.shard(whole_one.grad, spec, mesh), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@distributed(world_size=3, timeout=180)
def test_a_compiled_function_on_meshes_that_shard_otherwise(world_size: int) -> None:
    """Graphs are of one mesh, though torch takes the meshes for equal."""
    layout = sg.Layout("X[n,d] W[f/tp,d] -> Y[n,f/tp]")
    x, w = randn(4, 5, seed=1), randn(10, 5, seed=2)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(x: torch.Tensor, w: torch.Tensor, mesh: DeviceMesh) -> tuple[torch.Tensor, torch.Tensor]:
        y = sg.matmul(x, w, layout, mesh)
        return y, sg.VocabParallelLogits(y, vocab_size=10, mesh=mesh).entropy()

    right = F.linear(x, w)
    for mesh in in_turns(world_size):
        y, entropy = call(x, sg.shard(w, layout.rhs, mesh), mesh)
        torch.testing.assert_close(y, sg.shard(right, layout.out, mesh), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=right).entropy())
