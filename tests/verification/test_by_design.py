"""Terms of sums and of means are called so, and no sum that is missing is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hand import Hand, Single, rows, tp, wrong
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import shardgrad as sg
from shardgrad.testing import distributed


class MultiQuery(nn.Module):
    """x [b, s, d] → [b, s, d]: every rank has query heads of its own, and all the one key and value head."""

    def __init__(self, mesh: DeviceMesh | None = None, *, summed: bool = True) -> None:
        super().__init__()
        self.mesh, heads = mesh, 6 if mesh is None else 6 // mesh.size()
        self.norm, self.out = nn.LayerNorm(10), nn.Linear(3 * heads, 10, bias=False)
        self.query = nn.Linear(10, 3 * heads, bias=False)
        self.key, self.value = nn.Linear(10, 3, bias=False), nn.Linear(10, 3, bias=False)
        torch.manual_seed(0)
        for shared in (self.key, self.value):
            nn.init.normal_(shared.weight)
            if mesh is not None and summed:
                shared.weight.register_hook(lambda gradient: sg.all_reduce(gradient.contiguous(), mesh, "tp"))
        torch.manual_seed(0 if mesh is None else mesh.get_local_rank())
        nn.init.normal_(self.query.weight)
        nn.init.normal_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x if self.mesh is None else sg.replicate(x, self.mesh, "tp")
        query = self.query(x).unflatten(-1, (-1, 3)).transpose(1, 2)
        key, value = (each(x)[:, None].expand_as(query) for each in (self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        y = self.out(mixed.transpose(1, 2).flatten(2))
        return y if self.mesh is None else sg.all_reduce(y, self.mesh, "tp")


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_of_sums_are_called_so_and_sums_that_are_missing_are_not(world_size: int, dtype: torch.dtype) -> None:
    mesh = tp(world_size)
    x = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(3)).to(dtype)
    report = sg.verify(MultiQuery(mesh).to(dtype), MultiQuery(), x, mesh)
    assert report.ok, report.table()
    terms = {(row.kind, row.name) for row in report.with_verdict("term of a sum")}
    assert terms == {("output", "out"), ("output gradient", "key"), ("output gradient", "value")}
    assert "say so in `splits`" in report.summary()
    report = sg.verify(MultiQuery(mesh, summed=False).to(dtype), MultiQuery(), x, mesh)
    assert {("gradient", "key.weight"), ("gradient", "value.weight")} <= wrong(report)
    assert {row.name for row in report.with_verdict("term of a sum")} == {"out"}


@distributed(world_size=[2])
@pytest.mark.parametrize("convention", ["sum", "mean", "sum of means"])
def test_losses_of_data_parallel_programs(world_size: int, convention: str) -> None:
    mesh = tp(world_size)
    torch.manual_seed(0)
    model = Single()
    for parameter in model.parameters():
        parameter.register_hook(
            lambda g: sg.all_reduce(g.contiguous(), mesh, "tp") / (world_size if convention == "mean" else 1)
        )
    x, share = rows(count=6), world_size if convention == "sum" else 1
    report = sg.verify(
        model, Single(), x, mesh, loss=lambda m, x: m(x).square().mean(),
        parallel_loss=lambda m, x: m(x).square().mean() / share, parallel_batch=x.chunk(world_size)[dist.get_rank()],
    )  # fmt: skip
    assert report.ok == (convention != "sum of means"), report.table()
    unusual = {row.verdict for row in report.rows if row.verdict != "rounding"}
    if report.ok:
        assert unusual == {f"term of a {convention}"}


class Turned(nn.Module):
    """x [b, s, d] → [b, s, d]; on a mesh, what is between is [s, b, d]."""

    def __init__(self, mesh: DeviceMesh | None = None, mistake: str = "") -> None:
        super().__init__()
        self.mesh, self.mistake, ranks = mesh, mistake, 1 if mesh is None else mesh.size()
        self.up, self.down = nn.Linear(6, 12 // ranks, bias=False), nn.Linear(12 // ranks, 6, bias=False)
        torch.manual_seed(0 if mesh is None else mesh.get_local_rank())
        nn.init.normal_(self.up.weight)
        nn.init.normal_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.mesh is None:
            return self.down(F.gelu(self.up(x)))
        h = F.gelu(self.up(sg.replicate(x, self.mesh, "tp").transpose(0, 1)))
        h = 1.01 * h if self.mistake == "inside" else h
        y = sg.all_reduce(self.down(h), self.mesh, "tp")
        return y if self.mistake == "outside" else y.transpose(0, 1)


@distributed(world_size=[2, 3])
@pytest.mark.parametrize("mistake", ["", "inside", "outside"])
def test_another_order_of_dims_between_is_no_mistake(world_size: int, mistake: str) -> None:
    mesh = tp(world_size)
    x = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(2))
    report = sg.verify(Turned(mesh, mistake), Turned(), x, mesh)
    assert report.ok != bool(mistake), report.table()
    if not mistake:
        assert {row.name for row in report.with_verdict("stored otherwise")} == {"up", "down"}
        assert "say in `splits` how it is stored" in report.summary()
    else:
        assert report.first is not None
        assert {("gradient", "up.weight"), ("gradient", "down.weight")} & wrong(report)


class _Times(torch.autograd.Function):
    """In backward alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


@distributed(world_size=[2])
@pytest.mark.parametrize("undone", [True, False])
def test_a_factor_that_is_undone_is_no_mistake(world_size: int, undone: bool) -> None:
    """And no term of a mean, as the loss is none."""
    mesh = tp(world_size)
    model = Hand(mesh)

    def scaled(x: Tensor) -> Tensor:
        h = model.up(model.norm(x))
        h = model.act(_Times.apply(h, 1 / world_size) if undone else h)
        return model.down(_Times.apply(h, world_size))

    model.forward = scaled
    report = sg.verify(model, Single(), rows(), mesh)
    assert report.ok == undone, report.table()
    if undone:
        (row,) = report.with_verdict("stored otherwise")
        assert (row.kind, row.name) == ("output gradient", "act")
        assert not report.with_verdict("term of a mean")


@distributed(world_size=[2])
@pytest.mark.parametrize(("bug", "named"), [("none", "mean over tp missing"), ("sum", "summed twice over tp")])
def test_a_gradient_that_data_parallelism_has_wrong_is_blamed_not_the_loss(
    world_size: int, bug: str, named: str
) -> None:
    mesh = tp(world_size)
    torch.manual_seed(0)
    model = Single()
    for name, parameter in model.named_parameters():
        wrong_here = name == "up.bias"

        def reduced(g: Tensor, wrong_here: bool = wrong_here) -> Tensor:
            if wrong_here and bug == "none":
                return g
            return sg.all_reduce(g.contiguous(), mesh, "tp") / (1 if wrong_here else world_size)

        parameter.register_hook(reduced)
    x = rows(count=6)
    report = sg.verify(
        model, Single(), x, mesh, loss=lambda m, x: m(x).square().mean(), parallel_batch=x.chunk(2)[dist.get_rank()]
    )
    assert wrong(report) == {("gradient", "up.bias"), ("step", "up.bias")}, report.table()
    assert named in [fit.name for fit in report.diagnoses[0].fits]


@distributed(world_size=[2])
def test_rows_as_a_distributed_sampler_gives_them(world_size: int) -> None:
    mesh = tp(world_size)
    x = rows(count=6)
    for mistake in (False, True):
        torch.manual_seed(0)
        model = Single()
        for name, parameter in model.named_parameters():
            if not (mistake and name == "down.weight"):
                parameter.register_hook(lambda gradient: sg.all_reduce(gradient.contiguous(), mesh, "tp"))
        report = sg.verify(
            model, Single(), x, mesh, loss=lambda m, x: m(x).square().mean(),
            parallel_loss=lambda m, x: m(x).square().mean() / 2, parallel_batch=x[dist.get_rank() :: 2],
        )  # fmt: skip
        assert report.ok != mistake, report.table()
        if not mistake:
            assert ("input gradient", "input 0") in {
                (row.kind, row.name) for row in report.with_verdict("stored otherwise")
            }
    assert ("gradient", "down.weight") in wrong(report)


@distributed(world_size=[2])
@pytest.mark.parametrize("unscaled", [True, False])
def test_a_scaled_loss_whose_gradients_are_unscaled(world_size: int, unscaled: bool) -> None:
    mesh = tp(world_size)

    def complete(model: nn.Module) -> None:
        for parameter in model.parameters():
            if unscaled or parameter is not model.up.weight:
                parameter.grad /= 1024

    report = sg.verify(
        Hand(mesh), Single(), rows(), mesh, loss=lambda m, x: m(x).square().mean(),
        parallel_loss=lambda m, x: m(x).square().mean() * 1024, complete=complete, skip=["loss"],
    )  # fmt: skip
    assert report.ok == unscaled, report.table()
    assert unscaled or ("gradient", "up.weight") in wrong(report)


@distributed(world_size=[2])
def test_a_loss_that_every_rank_has_divided_is_no_term(world_size: int) -> None:
    """The ranks' losses would add up to it, but they are the same: the number is wrong, though its gradient is not."""
    mesh = tp(world_size)

    def halved(model: nn.Module, x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        return loss - (loss / world_size).detach()

    report = sg.verify(
        Hand(mesh), Single(), rows(), mesh, loss=lambda m, x: m(x).square().mean(), parallel_loss=halved
    )  # fmt: skip
    assert wrong(report) == {("loss", "loss")}, report.table()
