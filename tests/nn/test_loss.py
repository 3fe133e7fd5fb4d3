"""Cross-entropy over a sharded vocabulary against F.cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain import randn
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.testing import distributed

CUT = sg.Layout("X[b,s,d] W[v/tp,d] -> Y[b,s,v/tp]")["Y"]


@distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("vocabulary", [2, 5, 257])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch(world_size: int, vocabulary: int, label_smoothing: float, reduction: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    logits = (20 * randn(3, 5, vocabulary, seed=1)).requires_grad_()
    target = torch.randint(0, vocabulary, (3, 5), generator=torch.Generator().manual_seed(2))
    target[0, :2], target[2, 4] = -7, -7
    local = sg.shard(logits, CUT, mesh).requires_grad_()
    before = local.detach().clone()
    loss = sg.vocab_parallel_cross_entropy(
        local,
        target,
        vocab_size=vocabulary,
        mesh=mesh,
        ignore_index=-7,
        label_smoothing=label_smoothing,
        reduction=reduction,  # type: ignore[arg-type]
    )
    expected = F.cross_entropy(
        logits.movedim(-1, 1), target, ignore_index=-7, label_smoothing=label_smoothing, reduction=reduction
    )
    grad = randn(*expected.shape, seed=3)
    loss.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    assert local.grad is not None
    assert logits.grad is not None
    torch.testing.assert_close(sg.unshard(local.grad, CUT, mesh), logits.grad, rtol=1e-11, atol=1e-13)
    assert torch.equal(local.detach(), before)


@distributed(world_size=4)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_mean_is_over_all_tokens_wherever_they_are(world_size: int, reduction: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    logits = randn(6, 9, seed=1).requires_grad_()
    target = torch.randint(0, 9, (6,), generator=torch.Generator().manual_seed(2))
    target[:2] = -100  # one dp rank has 1 token that counts, the other 3: a mean of means would be wrong
    spec = sg.Layout("X[n/dp,d] W[v/tp,d] -> Y[n/dp,v/tp]")["Y"]
    local = sg.shard(logits, spec, mesh).requires_grad_()
    mine = sg.shard(target, sg.TensorSpec("t", spec.dims[:1]), mesh)
    loss = sg.vocab_parallel_cross_entropy(
        local,
        mine,
        vocab_size=9,
        mesh=mesh,
        token_axes=("dp",),
        reduction=reduction,  # type: ignore[arg-type]
    )
    expected = F.cross_entropy(logits, target, reduction=reduction)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=0)
    assert local.grad is not None
    assert logits.grad is not None
    torch.testing.assert_close(sg.unshard(local.grad, spec, mesh), logits.grad, rtol=1e-11, atol=1e-14)
    with pytest.raises(sg.ShapeError, match="cannot be one of token_axes"):
        sg.vocab_parallel_cross_entropy(local, mine, vocab_size=9, mesh=mesh, token_axes=("tp",))


@distributed(world_size=[1, 3])
def test_large_logits_and_16_bit_ones(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    logits = torch.tensor([[1e4, -1e4, 0.0, 9999.0, 3.0]], dtype=torch.float64)
    local = sg.shard(logits, sg.TensorSpec("l", CUT.dims[1:]).with_axes({"s": ()}), mesh)
    loss = sg.vocab_parallel_cross_entropy(local, torch.tensor([3]), vocab_size=5, mesh=mesh)
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([3])), rtol=1e-12, atol=0)
    half = randn(2, 3, 5, seed=1).bfloat16()
    local = sg.shard(half, CUT, mesh).requires_grad_()
    target = torch.tensor([[0, 1, 4], [2, 3, 3]])
    loss = sg.vocab_parallel_cross_entropy(local, target, vocab_size=5, mesh=mesh)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(half.float().movedim(-1, 1), target), rtol=1e-6, atol=0)
    loss.backward()
    assert local.grad is not None
    assert local.grad.dtype == torch.bfloat16


@distributed(world_size=[1, 2])
def test_every_token_ignored_and_logits_that_are_not_finite(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    logits = randn(1, 2, 4, seed=1)
    local = sg.shard(logits, CUT, mesh)
    none = torch.full((1, 2), -100)
    assert bool(sg.vocab_parallel_cross_entropy(local, none, vocab_size=4, mesh=mesh).isnan())  # as torch's 0 / 0
    assert float(sg.vocab_parallel_cross_entropy(local, none, vocab_size=4, mesh=mesh, reduction="sum")) == 0
    logits[0, 0, 3] = float("nan")
    local = sg.shard(logits, CUT, mesh).requires_grad_()
    target = torch.tensor([[-100, 1]])
    loss = sg.vocab_parallel_cross_entropy(local, target, vocab_size=4, mesh=mesh)
    loss.backward()
    assert bool(loss.isfinite())
    assert local.grad is not None
    assert bool(local.grad.isfinite().all())
    target = torch.tensor([[0, 1]])  # the NaN is on the last rank, every rank's loss must show it
    assert bool(sg.vocab_parallel_cross_entropy(local, target, vocab_size=4, mesh=mesh).isnan())


@distributed(world_size=2)
def test_wrong_uses_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    target = torch.tensor([0, 1, 2])

    def call(logits: torch.Tensor, target: torch.Tensor = target, **change: object) -> torch.Tensor:
        return sg.vocab_parallel_cross_entropy(logits, target, **{"vocab_size": 6, "mesh": mesh, **change})  # type: ignore[arg-type]

    with pytest.raises(sg.ShapeError, match=r"leaves rank \d of them 3 .*these logits are whole already"):
        call(torch.randn(3, 6))
    with pytest.raises(sg.ShapeError, match=r"logits have 4 columns"):
        call(torch.randn(3, 4))
    with pytest.raises(sg.ShapeError, match=r"target has shape \(3,\)"):
        call(torch.randn(2, 3))
    with pytest.raises(sg.ShapeError, match="integer ids"):
        call(torch.randn(3, 3), target.float())
    with pytest.raises(sg.ShapeError, match="floating point"):
        call(torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(IndexError, match="id 6 is outside the vocabulary of 6"):
        call(torch.randn(3, 3), torch.tensor([0, 6, 1]))
    with pytest.raises(ValueError, match="reduction must be"):
        call(torch.randn(3, 3), reduction="median")
    with pytest.raises(ValueError, match="label_smoothing must lie"):
        call(torch.randn(3, 3), label_smoothing=1.5)
    with pytest.raises(TypeError, match="vocab_size"):
        sg.vocab_parallel_cross_entropy(torch.randn(3, 3), target, mesh=mesh)  # type: ignore[call-arg]
