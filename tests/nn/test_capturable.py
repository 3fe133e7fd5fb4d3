"""A step that has been called before is one that a CUDA graph can capture: the same operations each time, whatever the
data, and no question to other ranks, the store or the device. `tests/gpu` captures on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import shardgrad as sg
from shardgrad.comm.mesh import view
from shardgrad.layout.layout import Layout
from shardgrad.layout.sizes import Sizes
from shardgrad.ops.size_exchange import exchange
from shardgrad.testing import distributed

READ_BY_HOST = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select"}


class Operations(TorchDispatchMode):
    """Notes what runs: names, shapes and dtypes. A graph would run it again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[object, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in READ_BY_HOST, f"the host reads the result of {func}"
        shapes = [(tuple(a.shape), a.dtype) for a in args if isinstance(a, Tensor)]
        self.found.append((func.name(), *shapes))
        return func(*args, **(kwargs or {}))


def asked(*args: object, **kwargs: object) -> NoReturn:
    raise AssertionError("a warm step asks other ranks")


Step = tuple[Callable[[Tensor], Tensor], list[Tensor], tuple[int, ...], tuple[int, ...]]


def steps(mesh: Any) -> dict[str, Step]:
    """Forward; its parameters; the shape of X, and of dY."""
    ranks = mesh.size()
    column = sg.ColumnParallelLinear(6, 4 * ranks, mesh=mesh)
    rows = sg.RowParallelLinear(4 * ranks, 6, mesh=mesh, sequence_dim=0)
    mlp = sg.SwiGLU(6, 4 * ranks, mesh=mesh, sequence_dim=0)
    norm = sg.RMSNorm(6, mesh=mesh, sequence_dim=0)
    attention = sg.Attention(4 * ranks, ranks, mesh=mesh)
    weight = nn.Parameter(torch.randn(6 // ranks, 5))
    fully = Layout("X[n/tp,d] W[d/tp,m] -> Y[n/tp,m]")
    product = partial(sg.matmul, w=weight, layout=fully, mesh=mesh, sizes={"n": 3 * ranks, "d": 6})
    return {
        "column": (column, [*column.parameters()], (5, 6), (5, 4)),
        "row": (rows, [*rows.parameters()], (3 * ranks, 4), (3, 6)),
        "mlp": (lambda x: mlp(x, 3 * ranks), [*mlp.parameters()], (3, 6), (3, 6)),
        "norm": (norm, [*norm.parameters()], (3, 6), (3, 6)),
        "attention": (attention, [*attention.parameters()], (2, 3, 4 * ranks), (2, 3, 4 * ranks)),
        "product": (product, [weight], (3, 6), (3, 5)),
    }


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("how", [None, 2])
def test_warm_steps_repeat_the_same_operations(
    world_size: int, how: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    sg.set_overlap(mesh, how)
    made = steps(mesh)

    def once(name: str) -> list[tuple[object, ...]]:
        step, parameters, of_x, of_y = made[name]
        x, dy = torch.randn(of_x, requires_grad=True), torch.randn(of_y)
        with Operations() as operations:
            # Not `backward`, which keeps a gradient or copies it, depending on who else still holds it.
            torch.autograd.grad(step(x), [x, *parameters], dy)
        return operations.found

    for name in made:
        for _ in range(2):
            once(name)
    for place in ("shardgrad.comm.comparison.compare", "shardgrad.comm.agree.compare", "shardgrad.comm.shim.store"):
        monkeypatch.setattr(place, asked)
    for place in ("collectives", "agree"):
        monkeypatch.setattr(f"shardgrad.comm.{place}.gather_ints", asked)
    monkeypatch.setattr("shardgrad.ops.size_exchange.gather_ints", asked)
    for name in made:
        first, second = once(name), once(name)
        assert any("c10d" in str(operation[0]) or "mm" in str(operation[0]) for operation in first) or name == "norm"
        assert first == second, name
    sg.set_overlap(mesh, None)


@distributed(world_size=2)
def test_sizes_that_are_not_told_are_refused_in_a_capture(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh_view = view(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)))
    sizes = Sizes(mesh_view.shape, mesh_view.coordinate)
    sizes.known["n", ("tp",)] = 3
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    exchange([("n", ())], sizes, mesh_view, "this product")  # on CPUs nothing is captured
    assert sizes.known["n", ()] == 6
    object.__setattr__(mesh_view, "device", torch.device("cuda"))
    with pytest.raises(sg.ShapeError, match=r"size of n.*capture of a CUDA graph: pass sizes=.*in this product"):
        exchange([("n", ())], sizes, mesh_view, "this product")
    object.__setattr__(mesh_view, "device", torch.device("cpu"))
