"""The largest of sharded logits, samples of them, and what `VocabParallelLogits` refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import randn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from whole_logits import Read, logits_of, part, z_of

import shardgrad as sg
from shardgrad.layout.sizes import chunk
from shardgrad.nn import sampling
from shardgrad.testing import distributed

TIES = torch.tensor(
    [
        [1, 3, 3, 0, 3, 2, 3, 3, -1, 3, 0, 1, 3],
        [0.0] * 13,
        [5, -torch.inf, torch.inf, torch.nan, torch.inf, 0, -torch.inf, torch.nan, 1, 1, 1, 1, 1],
        [-torch.inf] * 12 + [0],
        [-0.0, 0.0, -0.0, 0.0, -1, -1, -0.0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.float64,
)


@distributed(world_size=[1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_largest_are_those_of_a_stable_sort(world_size: int, dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    whole = torch.cat([TIES, randn(4, 13, seed=1)]).to(dtype)
    for size in (13, 5):
        full = whole[:, :size].contiguous()
        wide = full.to(torch.promote_types(dtype, torch.float32))
        order = wide.sort(dim=-1, descending=True, stable=True)
        for k in (1, 2, 4, size):
            local = part(full, mesh).requires_grad_()
            with sg.trace_collectives() as traced:
                values, ids = logits_of(local, size, mesh).topk(k)
            each = len(full) * k * (world_size - 1)  # values, and ids of 4 bytes
            sent = [("all-gather", each * width) for width in (wide.itemsize, 4)] if world_size > 1 else []
            assert [(e.operation, e.bytes) for e in traced] == sent
            assert torch.equal(ids, order.indices[:, :k])
            torch.testing.assert_close(values.detach(), order.values[:, :k], rtol=0, atol=0, equal_nan=True)
            grad = randn(*values.shape, seed=2).to(values.dtype)
            right = torch.zeros_like(wide).scatter_(-1, ids, grad).to(dtype)
            assert torch.equal(torch.autograd.grad(values, local, grad)[0], part(right, mesh))
        found = logits_of(part(full, mesh), size, mesh).argmax()
        assert torch.equal(found, wide.argmax(-1))


@distributed(world_size=[1, 2, 3, 4])
def test_samples_are_those_of_one_rank_and_of_the_distribution(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("one", "tp"))
    alone, over = mesh["one"], mesh["tp"]
    read = Read(0.9, 4.0)
    rows = 4000
    ways: list[tuple[dict[str, Any], int]] = [
        ({}, 13), ({"top_k": 4}, 4), ({"top_k": 13}, 13), ({"top_p": 0.8}, 13), ({"top_p": 0.5}, 13),
        ({"top_k": 6, "top_p": 0.7}, 6), ({"top_p": 1.0}, 13), ({"top_p": 1e-9}, 1),
    ]  # fmt: skip
    for size in (13, 5):
        one = randn(1, size, seed=3).float()
        one[0, 1], one[0, size - 1] = -torch.inf, one[0, 0]  # nothing, and a tie
        p = z_of(one.double(), Read(0.9)).softmax(-1)
        whole = one.expand(rows, size).contiguous()
        for at, (how, most) in enumerate(ways):
            drawn = logits_of(part(whole, over), size, over, Read(0.9)).sample(seed=at, **how)
            assert torch.equal(
                drawn,
                sg.VocabParallelLogits(whole, vocab_size=size, mesh=alone, axis="one", temperature=0.9).sample(
                    seed=at, **how
                ),
            )
            right = kept(p[0], min(most, size), how.get("top_p", 1.0))
            found = torch.bincount(drawn, minlength=size).double()
            far = 5 * (rows * right * (1 - right)).sqrt()
            assert bool(((found - rows * right).abs() <= far).all()), (how, found / rows, right)
            assert not bool(found[right == 0].any())
        capped = logits_of(part(whole, over), size, over, read)
        assert torch.equal(capped.sample(seed=1, top_k=1), capped.argmax())


def kept(p: Tensor, k: int, top_p: float) -> Tensor:
    """The distribution that is drawn from: of the k likeliest, the fewest that have top_p of them together."""
    order = p.sort(descending=True, stable=True).indices[:k]
    likely = p[order] / p[order].sum()
    likely = likely * (likely.cumsum(0) - likely < top_p)
    return torch.zeros_like(p).scatter_(0, order, likely / likely.sum())


@distributed(world_size=[2, 3])
def test_tokens_are_drawn_in_blocks_alike(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    logits = logits_of(part(randn(30, 7, seed=1), mesh), 7, mesh)
    ways: tuple[dict[str, Any], ...] = ({}, {"top_p": 0.5}, {"top_k": 3})
    at_once = [logits.sample(seed=1, **how) for how in ways]
    monkeypatch.setattr(sampling, "_BLOCK", 4 * chunk(7, world_size, 0)[1])
    for how, right in zip(ways, at_once):
        assert torch.equal(logits.sample(seed=1, **how), right)


def test_what_has_no_mass_is_never_drawn() -> None:
    until = torch.tensor([[0, 2, 2, 5]])
    for target, place in enumerate([1, 1, 3, 3, 3]):
        assert sampling._place(until, torch.tensor([target])).tolist() == [place]
    for uniform in (0.0, 1 - 2.0**-53):
        assert sampling._target(torch.tensor([uniform], dtype=torch.float64), torch.tensor([5])).tolist() == [
            4 if uniform else 0
        ]
    assert int(sampling._target(torch.tensor([1 - 2.0**-53]).double(), torch.tensor([2**62])) < 2**62)


@distributed(world_size=[2, 3])
def test_draws_follow_their_seeds(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    logits = logits_of(part(randn(2, 50, 7, seed=1), mesh), 7, mesh)
    first = logits.sample(seed=-1)
    assert first.shape == (2, 50)
    assert torch.equal(first, logits.sample(seed=-1))
    assert not torch.equal(first, logits.sample(seed=2))
    assert not torch.equal(first[0], first[1])
    assert logits.sample(generator=torch.Generator().manual_seed(3)).equal(
        logits.sample(generator=torch.Generator().manual_seed(3))
    )
    torch.manual_seed(4)
    assert not torch.equal(logits.sample(), logits.sample())
    with pytest.raises(sg.DisagreementError, match="sample with different seeds, 5 to"):
        logits.sample(seed=5 + mesh.get_local_rank())
    halves = logits_of(part(torch.zeros(40, 4), mesh), 4, mesh)
    for how in ({}, {"top_k": 4}):  # the first two have 0.5 already
        assert halves.sample(seed=1, top_p=0.5, **how).unique().tolist() == [0, 1]  # type: ignore[arg-type]
    empty = logits_of(part(randn(0, 7, seed=1), mesh), 7, mesh)
    assert empty.sample(seed=1, top_p=0.5).shape == (0,)
    for wrong in (torch.nan, torch.inf):
        bad = randn(3, 7, seed=1)
        bad[1, 6] = wrong
        for how in ({}, {"top_k": 2}, {"top_p": 0.5}):
            with pytest.raises(ValueError, match="logits of token 1 cannot be sampled"):
                logits_of(part(bad, mesh), 7, mesh).sample(seed=1, **how)  # type: ignore[arg-type]


@distributed(world_size=[2, 3])
def test_a_draw_of_all_is_a_few_numbers_a_token(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    logits = logits_of(part(randn(5, 1001, seed=1), mesh), 1001, mesh)
    with sg.trace_collectives() as traced:
        logits.sample(seed=1)
    assert [(e.operation, e.shape) for e in traced] == [
        ("all-reduce", (2,)), ("all-reduce", (2, 5)), ("all-gather", (1, 5)), ("all-reduce", (2, 5)),
    ]  # fmt: skip
    even = logits_of(torch.zeros_like(logits.logits), 1001, mesh)
    with sg.trace_collectives() as traced:
        assert even.sample(seed=1, top_p=1e-9).tolist() == [0] * 5
    assert len(traced.events) < 2 + 3 * 30  # each round leaves half of what there was: some 10 of them, not 1001


@distributed(world_size=2)
def test_wrong_uses_are_refused(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    local = torch.randn(4, 3)
    logits = sg.VocabParallelLogits(local, vocab_size=6, mesh=mesh)

    def made(local: Tensor = local, **change: Any) -> sg.VocabParallelLogits:
        return sg.VocabParallelLogits(local, **{"vocab_size": 6, "mesh": mesh, **change})

    with pytest.raises(sg.ShapeError, match="these logits are whole already"):
        made(torch.randn(4, 6))
    with pytest.raises(ValueError, match="temperature must be a positive number, not 0"):
        made(temperature=0)
    with pytest.raises(ValueError, match="soft_cap must be a positive number, not nan"):
        made(soft_cap=float("nan"))
    with pytest.raises(ValueError, match="statistics of nothing"):
        logits.statistics()
    with pytest.raises(sg.ShapeError, match=r"tokens have shape \(3,\), logits \(4, 3\): expected \(4,\), or"):
        logits.log_prob(torch.tensor([1, 2, 3]))
    with pytest.raises(sg.ShapeError, match="integer ids"):
        logits.log_prob(torch.ones(4))
    with pytest.raises(IndexError, match="id 6 is outside the vocabulary of 6"):
        logits.log_prob(torch.tensor([1, 2, 6, -100]))
    with pytest.raises(IndexError, match="id -100 is outside"):
        logits.log_prob(torch.tensor([1, 2, 5, -100]), ignore_index=5)
    with pytest.raises(sg.ShapeError, match="both must be of the same tokens and vocabulary, over the same axis"):
        logits.kl_div(made(torch.randn(5, 3)))
    with pytest.raises(TypeError, match="kl must be"):
        logits.kl_div(local)  # type: ignore[arg-type]
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"k must lie between 1 and the vocabulary of 6, not {k}"):
            logits.topk(k)
    with pytest.raises(ValueError, match="top_k is 0, below 1"):
        logits.sample(top_k=0)
    for p in (0.0, 1.5):
        with pytest.raises(ValueError, match="top_p must lie in"):
            logits.sample(top_p=p)
    with pytest.raises(ValueError, match="seed or generator, not both"):
        logits.sample(seed=1, generator=torch.Generator())
    assert "(4, 3) of 6" in repr(logits)


@distributed(world_size=3)
def test_divergence_from_logits_of_a_mesh_that_shards_otherwise_is_refused_on_every_rank(world_size: int) -> None:
    """4 words as 2, 2, 0 and as 2, 1, 1: on rank 0 the parts have one shape, and the axes are equal."""
    plain, even = (init_device_mesh("cpu", (3,), mesh_dim_names=("tp",)) for _ in range(2))
    sg.set_balanced(even)
    sizes = zip((plain, even), ((2, 2, 0), (2, 1, 1)))
    p, q = (sg.VocabParallelLogits(torch.randn(5, n[m.get_local_rank()]), vocab_size=4, mesh=m) for m, n in sizes)
    with pytest.raises(sg.ShapeError, match="shards alike"):
        p.kl_div(q)
