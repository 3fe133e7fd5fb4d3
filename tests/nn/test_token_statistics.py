"""Numbers of sharded logits, and their gradients, against float64 on whole logits."""

from __future__ import annotations

import pytest
import torch
from plain import randn
from test_compile_shapes import Counted, setting
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from whole_logits import Read, assert_near, bound, logits_of, numbers, part, present, z_of

import shardgrad as sg
from shardgrad.nn.token_sums import statistics_collectives
from shardgrad.testing import distributed

ALL = {"logsumexp": True, "entropy": True, "mean_log_prob": True}
READ, ITS = Read(0.7, 3.0), Read(1.3)


def chosen(vocabulary: int, *shape: int) -> Tensor:
    tokens = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(5))
    tokens[0, 0] = vocabulary - 1
    tokens[-1, 1] = -100
    tokens[1].view(-1)[0] = -100
    return tokens


@distributed(world_size=[1, 2, 3, 4, 8])
@pytest.mark.parametrize("vocabulary", [13, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_number_and_its_gradient_alone_and_together(world_size: int, vocabulary: int, dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    tokens = chosen(vocabulary, 4, 3, 2)
    whole, second = ((4 * randn(4, 3, vocabulary, seed=s)).to(dtype).double().requires_grad_() for s in (1, 2))
    right = numbers(whole, tokens, second, READ, ITS)
    grads = {name: randn(*value.shape, seed=at) for at, (name, value) in enumerate(right.items())}
    mine, its = (part(one, mesh).to(dtype).requires_grad_() for one in (whole, second))
    before = mine.detach().clone(), its.detach().clone()
    wide = torch.promote_types(dtype, torch.float32)
    values = logits_of(mine, vocabulary, mesh, READ).statistics(tokens, kl=logits_of(its, vocabulary, mesh, ITS), **ALL)
    far = bound(z_of(whole.detach(), READ), z_of(second.detach(), ITS), wide)
    for name, value in present(values._asdict()).items():
        assert value.dtype == wide
        assert_near(value.detach(), right[name].detach(), far.unsqueeze(-1) if name == "log_prob" else far, name)
    rounded = 0.0 if dtype == wide else torch.finfo(dtype).eps
    for names in [*([name] for name in right), list(right)]:
        outputs, flows = [values._asdict()[n] for n in names], [grads[n].to(wide) for n in names]
        leaves = {"of the logits": (mine, whole), "of the second": (its, second)}
        for what, (leaf, full) in leaves.items():
            found = torch.autograd.grad(outputs, leaf, flows, retain_graph=True, allow_unused=True)[0]
            flow = [grads[n].to(wide).double() for n in names]
            exact = torch.autograd.grad([right[n] for n in names], full, flow, retain_graph=True, allow_unused=True)[0]
            if exact is None or found is None:
                assert exact is None or not bool(exact.any())
                assert found is None or not bool(found.any())
                continue
            size = sum(f.abs().sum(-1) if n == "log_prob" else f.abs() for n, f in zip(names, flow))
            within = (far * size / min(READ.temperature, 1)).unsqueeze(-1) + rounded * part(exact, mesh).abs()
            assert found.dtype == dtype
            assert_near(found, part(exact, mesh), within, f"{what} by {names}")
    assert torch.equal(mine.detach(), before[0])
    assert torch.equal(its.detach(), before[1])


@distributed(world_size=[1, 2, 3])
def test_one_pass_is_two_reductions_as_predicted_and_backward_none(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    for dtype, asked in (
        (torch.float32, {"entropy": True, "chosen": 2, "kl": True, "mean": True}),
        (torch.bfloat16, {"chosen": 1}),
        (torch.float64, {"entropy": True}),
        (torch.float64, {"kl": True}),
    ):
        local = part(randn(5, 7, seed=1), mesh).to(dtype).requires_grad_()
        logits = logits_of(local, 7, mesh)
        ids = chosen(7, 5, 2)[:, : asked["chosen"]] if "chosen" in asked else None
        with sg.trace_collectives() as traced:
            values = logits.statistics(
                ids,
                entropy=asked.get("entropy", False),  # type: ignore[arg-type]
                mean_log_prob=asked.get("mean", False),  # type: ignore[arg-type]
                kl=logits if asked.get("kl") else None,
            )
        predicted = statistics_collectives(5, dtype, mesh=mesh, **asked)  # type: ignore[arg-type]
        assert [(e.operation, e.bytes) for e in traced] == [(c.operation, c.bytes) for c in predicted]
        assert len(traced.events) == (2 if world_size > 1 else 0)
        with sg.trace_collectives() as traced:
            sum(value.sum() for value in present(values._asdict()).values()).backward()  # type: ignore[union-attr]
        assert traced.events == []


@distributed(world_size=[1, 2, 3])
def test_logits_that_are_not_finite_are_as_torchs(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    inf, nan = torch.inf, torch.nan
    rows = [[-inf, 0, 1, -inf, 2], [-inf] * 5, [0, 1, inf, 0, 1], [0, 1, 2, 3, nan], [inf, 1, 1, inf, 0]]
    whole = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[4, 0], [1, 2], [2, 0], [0, 1], [0, 1]])
    right = numbers(whole, tokens, whole.detach())
    local = part(whole, mesh).requires_grad_()
    frozen = logits_of(local.detach(), 5, mesh)
    values = logits_of(local, 5, mesh).statistics(tokens, logsumexp=True, entropy=True, kl=frozen)._asdict()
    for name, value in present(values).items():
        torch.testing.assert_close(value, right[name], rtol=1e-14, atol=1e-14, equal_nan=True, msg=name)
        kept = 1 if name != "logsumexp" else 2  # torch's own gradient at +∞ is 0 beside NaN
        found = torch.autograd.grad(value[:kept].sum(), local, retain_graph=True)[0]
        assert bool(found[0].isfinite().all()), name  # where p is 0, p log p is 0
        if name == "log_prob":
            exact = torch.autograd.grad(right[name][:1].sum(), whole, retain_graph=True)[0]
            torch.testing.assert_close(found[:1], part(exact, mesh)[:1], rtol=1e-14, atol=1e-15)
        assert not bool(found[3:].any())  # into which nothing flows, finite or not
    masked = part(whole[:1], mesh).requires_grad_()
    values = logits_of(masked, 5, mesh).statistics(entropy=True, kl=logits_of(masked.detach() / 2, 5, mesh))
    assert values.entropy is not None
    assert values.kl is not None
    once = torch.autograd.grad((values.entropy + values.kl).sum(), masked, create_graph=True)[0]
    assert bool(torch.autograd.grad(once.square().sum(), masked)[0].isfinite().all())
    other = part(whole, mesh).requires_grad_()
    logits_of(torch.zeros_like(other), 5, mesh).kl_div(logits_of(other, 5, mesh))[:0].sum().backward()
    assert other.grad is not None
    assert not bool(other.grad.any())
    q = torch.tensor([[0.0, 0, -inf, 0, 0]], dtype=torch.float64)
    p = torch.zeros_like(q)
    to, back = (
        logits_of(part(a, mesh), 5, mesh).kl_div(logits_of(part(b, mesh), 5, mesh)) for a, b in ((p, q), (q, p))
    )
    assert to.tolist() == [inf]
    torch.testing.assert_close(back, torch.tensor([5 / 4], dtype=torch.float64).log(), rtol=1e-14, atol=0)


@distributed(world_size=[1, 2])
def test_large_logits_lose_no_more_than_torchs(world_size: int) -> None:
    """Numbers are of distances from the maximum: 10⁴ and 10⁴ + 1 differ by 1 in float32 too."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    whole = (torch.tensor([[0.0, 1.0, -1.0, 0.5]]) + 2.0**14).requires_grad_()
    local = part(whole, mesh).requires_grad_()
    values = logits_of(local, 4, mesh).statistics(torch.tensor([2]), entropy=True)
    right = numbers(whole.double(), torch.tensor([[2]]), None)
    assert values.log_prob is not None
    torch.testing.assert_close(values.log_prob.double(), right["log_prob"][:, 0], rtol=4e-7, atol=0)
    found = torch.autograd.grad(values.log_prob, local, torch.ones(1))[0]
    exact = torch.autograd.grad(right["log_prob"].sum(), whole)[0]
    torch.testing.assert_close(found, part(exact, mesh), rtol=4e-7, atol=0)


def again(total: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
    """This rank's part of a sum over all elements of the gradients."""
    grads = torch.autograd.grad(total, leaves, create_graph=True, retain_graph=True)
    return torch.stack([(grad * grad.sin()).sum() for grad in grads]).sum()


@distributed(world_size=[2, 3])
def test_second_derivatives(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    tokens = chosen(5, 2, 2, 2)
    whole, second = (randn(2, 2, 5, seed=s).requires_grad_() for s in (1, 2))
    mine, its = (part(one, mesh).requires_grad_() for one in (whole, second))
    values = logits_of(mine, 5, mesh, READ).statistics(tokens, kl=logits_of(its, 5, mesh, ITS), **ALL)._asdict()
    values, right = present(values), numbers(whole, tokens, second, READ, ITS)
    for name in [*right, None]:
        totals = [
            torch.stack([v.sin().sum() for n, v in each.items() if name in (n, None)]).sum() for each in (values, right)
        ]
        leaves = [(mine, its), (whole, second)] if name in ("kl", None) else [(mine,), (whole,)]
        found, exact = (torch.autograd.grad(again(t, x), x, retain_graph=True) for t, x in zip(totals, leaves))
        for f, e in zip(found, exact):
            torch.testing.assert_close(f, part(e, mesh), rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@distributed(world_size=2)
def test_torch_compile_has_it_in_one_graph(world_size: int) -> None:
    mesh = setting()
    tokens, local, other = chosen(5, 4, 3), part(randn(4, 5, seed=1), mesh), part(randn(4, 5, seed=2), mesh)

    def call(x: Tensor, y: Tensor) -> Tensor:
        policy, reference = logits_of(x, 5, mesh, READ), logits_of(y, 5, mesh)
        values = policy.statistics(tokens, entropy=True, logsumexp=True, kl=reference)
        assert values.log_prob is not None
        assert values.entropy is not None
        assert values.kl is not None
        part = policy.log_softmax().square().sum() + policy.topk(2).values.sum()
        return values.log_prob.sum(-1) + 2 * values.entropy + 3 * values.kl + part

    made = []
    compiled = Counted(call, fullgraph=True)
    for each in (call, compiled):
        x, y = (t.clone().requires_grad_() for t in (local, other))
        value = each(x, y)
        made.append((value.detach(), *torch.autograd.grad(value.sin().sum(), (x, y))))
    for found, right in zip(*made):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)
    assert compiled.graphs == 1


@distributed(world_size=[2, 3])
def test_log_softmax(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    whole = randn(4, 7, seed=1).requires_grad_()
    local = part(whole, mesh).requires_grad_()
    found, right = logits_of(local, 7, mesh, READ).log_softmax(), z_of(whole, READ).log_softmax(-1)
    torch.testing.assert_close(found.detach(), part(right, mesh), rtol=1e-13, atol=1e-14)
    grad = randn(4, 7, seed=2)
    exact = torch.autograd.grad(right, whole, grad)[0]
    with sg.trace_collectives() as traced:
        mine = torch.autograd.grad(found, local, part(grad, mesh))[0]
    torch.testing.assert_close(mine, part(exact, mesh), rtol=1e-12, atol=1e-13)
    assert [(event.operation, event.shape) for event in traced] == [("all-reduce", (4,))]
