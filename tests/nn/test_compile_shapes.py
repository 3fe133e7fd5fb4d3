"""torch.compile where shapes, dtypes and graphs change: other lengths, autocast, checkpoints, what breaks a graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from exact import integers
from plain import randn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

import shardgrad as sg
from shardgrad import PRESETS
from shardgrad.layout.sizes import chunk
from shardgrad.testing import distributed
from shardgrad.train.model import GPT


class Counted:
    """A compiled call, and how many graphs it was made into."""

    def __init__(self, call: Callable[..., Any], **settings: Any) -> None:
        self.graphs = 0
        self._call = torch.compile(call, backend=self._backend, **settings)

    def _backend(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def setting(axes: Sequence[str] = ("tp",)) -> DeviceMesh:
    torch.compiler.reset()
    warnings.simplefilter("ignore")  # torch's own, as it compiles
    torch.manual_seed(5)
    return init_device_mesh("cpu", (2, *(1 for _ in axes[1:])), mesh_dim_names=tuple(axes))


def assert_alike(call: Any, compiled: Any, *args: Any, parameters: Sequence[Tensor] = (), marked: bool = False) -> None:
    """Values and gradients of two calls."""
    made = []
    for one in (call, compiled):
        own = [a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        if marked and one is compiled:
            torch._dynamo.mark_dynamic(own[0], 1)
        y = one(*own)
        leaves = [*(a for a in own if isinstance(a, Tensor) and a.requires_grad), *parameters]
        made.append([y, *torch.autograd.grad(y.float().sin().sum(), leaves)])
    for found, right in zip(made[1], made[0]):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@distributed(world_size=2)
@pytest.mark.parametrize(
    ("sequence_dim", "how"),
    [
        (1, "as it comes"),
        pytest.param(None, "marked", marks=pytest.mark.slow),
        pytest.param(None, "as it comes", marks=pytest.mark.slow),
        pytest.param(None, "dynamic", marks=pytest.mark.slow),
        pytest.param(1, "dynamic", marks=pytest.mark.slow),
    ],
)
def test_other_lengths_are_one_more_graph_and_no_more(world_size: int, sequence_dim: int | None, how: str) -> None:
    """Also of more lengths than torch makes graphs of one function (8), after which fullgraph=True raises."""
    mesh = setting()
    layer = sg.MLP(8, 10, mesh=mesh, sequence_dim=sequence_dim)
    compiled = Counted(layer, fullgraph=True, dynamic=how == "dynamic" or None)
    for length in (5, 8, 13, 9, 4, 7, 12, 6, 10, 11):
        here = length if sequence_dim is None else chunk(length, 2, mesh.get_local_rank())[1]
        x, more = torch.randn(2, here, 8), () if sequence_dim is None else (length,)
        assert_alike(layer, compiled, x, *more, parameters=list(layer.parameters()), marked=how == "marked")
    assert compiled.graphs <= (2 if sequence_dim == 1 or how == "as it comes" else 1)


@pytest.mark.slow
@distributed(world_size=2)
@pytest.mark.parametrize("name", PRESETS)
def test_other_sizes_of_every_published_layout(world_size: int, name: str) -> None:
    layout = PRESETS[name]
    mesh = setting(layout.axes)

    def call(x: Tensor, w: Tensor, sizes: dict[str, int]) -> Tensor:
        return sg.matmul(x, w, layout, mesh, sizes=sizes)

    compiled = Counted(call, fullgraph=True)
    for rows in (5, 8, 6, 9, 7, 4):
        sizes = dict.fromkeys(layout.letters, 6) | {layout.rows[0]: rows}
        x, w = (sg.shard(integers(spec, sizes, 1), spec, mesh) for spec in (layout.lhs, layout.rhs))
        assert_alike(call, compiled, x, w, sizes)
    assert compiled.graphs <= 2


@pytest.mark.slow
@distributed(world_size=2)
def test_a_model_of_other_lengths(world_size: int) -> None:
    model = GPT(layers=1, heads=2, d_model=12, seq_len=16, vocab=11, tied=True, mesh=setting())
    compiled = Counted(model.loss, fullgraph=True)
    for batch, length in ((2, 5), (2, 8), (3, 8), (4, 11), (2, 16), (5, 7)):
        ids = torch.randint(0, 11, (batch, length + 1), generator=torch.Generator().manual_seed(length))
        assert_alike(model.loss, compiled, ids[:, :-1], ids[:, 1:], parameters=list(model.parameters()))
    assert compiled.graphs <= 3


@distributed(world_size=2)
def test_autocast_around_and_inside(world_size: int) -> None:
    layer = sg.SwiGLU(8, 10, mesh=setting())

    def inside(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def under(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return call(x)

        return under

    x, parameters = torch.randn(3, 8), list(layer.parameters())
    assert inside(layer)(x).dtype == torch.bfloat16
    assert_alike(inside(layer), inside(Counted(layer, fullgraph=True)), x, parameters=parameters)
    assert_alike(inside(layer), Counted(inside(layer), fullgraph=True), x, parameters=parameters)


@pytest.mark.slow
@distributed(world_size=2)
def test_checkpoints_around_and_inside(world_size: int) -> None:
    """What is inside a graph's checkpoint is computed again as ever: before torch 2.15 outside of it, in graphs of its
    own."""
    mesh = setting()
    norm, layer = sg.LayerNorm(8, mesh=mesh, sequence_dim=0), sg.MLP(8, 10, mesh=mesh)

    def body(x: Tensor) -> Tensor:
        return sg.gather_replicated(norm(x), mesh, size=6) + layer(sg.all_gather(x, mesh, size=6))

    def around(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(call, x * 1.5, use_reentrant=False).cos()

    def loss(x: Tensor) -> Tensor:
        target = torch.tensor([1, 2, 3])
        return sg.vocab_parallel_cross_entropy(x, target, vocab_size=16, mesh=mesh)

    x, parameters = torch.randn(3, 8), [*norm.parameters(), *layer.parameters()]
    within = torch.__version__ >= (2, 15)
    assert_alike(around(body), Counted(around(body), fullgraph=within), x, parameters=parameters)
    assert_alike(around(body), around(Counted(body)), x, parameters=parameters)
    assert_alike(around(loss), Counted(around(loss), fullgraph=within), x)
    if within:
        return
    with pytest.raises(Exception, match="shardgrad: a checkpoint runs outside of graphs"):
        Counted(around(body), fullgraph=True)(x.requires_grad_())


@pytest.mark.slow
@distributed(world_size=2)
def test_moe_breaks_the_graph(world_size: int) -> None:
    mesh = setting()
    moe, after = sg.MoE(6, 5, 4, mesh=mesh, axis="tp"), sg.SwiGLU(6, 8, mesh=mesh)

    def step(x: Tensor) -> Tensor:
        """Backward runs between graphs too."""
        y = after(moe(x.sin())[0])
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=False)
        return grad * y.detach() + x

    for rows in (4, 5):
        assert_alike(step, Counted(step), torch.randn(rows, 6))
        compiled = Counted(moe)
        assert_alike(lambda x: moe(x)[0], lambda x, c=compiled: c(x)[0], torch.randn(rows, 6))
    with pytest.raises(Exception, match="MoE: its shapes depend on which experts"):
        Counted(moe, fullgraph=True)(torch.randn(4, 6))


@distributed(world_size=2)
def test_convolve_is_in_the_graph(world_size: int) -> None:
    mesh = setting()
    layout = sg.Layout("X[b,c,h] W[o/tp,c,i] -> Y[b,o/tp,p]", spatial=1)
    w = sg.shard(randn(5, 2, 3, seed=1), layout.rhs, mesh)
    for of in (layout, layout.text):

        def convolve(x: Tensor, w: Tensor, of: Any = of) -> Tensor:
            return sg.convolve(x, w, of, mesh, padding=1, stride=2)

        compiled = Counted(convolve, fullgraph=True)
        for batch, size in ((2, 6), (3, 6), (4, 9), (2, 8)):
            assert_alike(convolve, compiled, randn(batch, 2, size, seed=batch), w)
        assert compiled.graphs <= 3


@pytest.mark.slow
@distributed(world_size=2)
def test_derivatives_that_a_graph_has_not_raise(world_size: int) -> None:
    from torch.autograd.functional import hvp

    layer = sg.MLP(6, 8, mesh=setting())
    x = torch.randn(3, 6)
    for backend in ("eager", "aot_eager"):
        compiled: nn.Module = torch.compile(layer, backend=backend)
        with pytest.raises(
            RuntimeError, match=r"shardgrad\.product_backward|does not currently support double backward"
        ):
            hvp(lambda x, c=compiled: c(x).square().sum(), x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match=r"shardgrad\.product"):
            torch.compile(lambda x: torch.func.grad(lambda x: layer(x).sum())(x), backend=backend)(x)
