"""A sharded training curve lies among those of one device that sum in another order; a mistake does not."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import shardgrad as sg
from shardgrad.testing import distributed
from shardgrad.train import decoder
from shardgrad.train.build import build, build_reference
from shardgrad.train.config import Config, Mesh, Model, Train
from shardgrad.train.curve import ALLOWED, Spread, reference_curve, renamed, sharded_curve, spread
from shardgrad.train.optimizer import make_optimizer
from shardgrad.train.reference import Reference

VOCAB, BATCH, SEQUENCE = 23, 8, 8
TRAIN = Train(steps=50, batch=BATCH, lr=0.01, warmup=5, clip=1.0)
MODELS = {
    "gpt": Model(kind="gpt", layers=1, heads=4, d_model=16, seq_len=SEQUENCE, tied=True),
    "llama": Model(kind="llama", layers=1, heads=4, kv_heads=2, d_model=16, seq_len=SEQUENCE),
}


def batches(step: int) -> tuple[Tensor, Tensor]:
    """Sequences that count in steps of 1 to 3, with some noise: to be learned, but not wholly."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, VOCAB, (BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (BATCH, 1), generator=generator)
    noise = (torch.rand(BATCH, SEQUENCE + 1, generator=generator) < 0.1).long()
    text = (start + stride * torch.arange(SEQUENCE + 1) + noise) % VOCAB
    return text[:, :-1], text[:, 1:]


def initial(kind: str) -> Reference:
    """A reference with random values, always the same."""
    reference = build_reference(MODELS[kind], VOCAB)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for (
            name,
            parameter,
        ) in reference.named_parameters():  # norms too, so that a permutation that forgets one is seen
            middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(middle + 0.2 * torch.randn(parameter.shape, generator=generator))
    return reference


@cache
def spread_of(kind: str) -> Spread:
    """The curves of one device, made once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return spread(lambda: initial(kind), batches, TRAIN, runs=6)
    finally:
        torch.set_num_threads(threads)


KINDS = ["llama", pytest.param("gpt", marks=pytest.mark.slow)]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def measured(kind: str) -> Spread:
    """What one device does, made by pytest and sent to the ranks."""
    return spread_of(kind)


def train(kind: str, grid: tuple[int, int], sharded: bool = False, accumulate: int = 1, **planted: Any) -> list[float]:
    """The curve of a mesh, from the values of `initial`. planted: a factor of this rank's learning rate."""
    settings = TRAIN.model_copy(update={"accumulate": accumulate})
    config = Config(model=MODELS[kind], train=settings, mesh=Mesh(fully_sharded=sharded))
    mesh = init_device_mesh("cpu", grid, mesh_dim_names=("dp", "tp"))
    model, reference = build(config, VOCAB, mesh), initial(kind)
    with torch.no_grad():
        for name, parameter, sharding in sg.named_shardings(model):
            assert sharding is not None
            parameter.copy_(sg.shard(reference.parameter_of(name).view(sharding.shape), sharding.spec, mesh))
    optimizer = make_optimizer(model, settings)
    if planted and torch.distributed.get_rank() == 1:
        settings = settings.model_copy(update={"lr": settings.lr * planted["rate"]})
    return sharded_curve(model, optimizer, batches, settings)


def test_renaming_changes_nothing_but_rounding(kind: str, measured: Spread) -> None:
    one, other = initial(kind).double(), initial(kind).double()
    renamed(other, torch.Generator().manual_seed(1))
    ids, targets = batches(0)
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert one.loss(ids, targets).item() == pytest.approx(other.loss(ids, targets).item(), rel=1e-14)
    curves = measured.curves
    assert len(set(curves)) == 6  # each sums in an order of its own
    assert curves[0][-1] < 0.8 * curves[0][0]  # something is learned
    # Leave one out: how far a right run is from the others.
    for at, curve in enumerate(curves):
        assert Spread(curves[:at] + curves[at + 1 :]).distance(curve) < ALLOWED
    changed = TRAIN.model_copy(update={"lr": TRAIN.lr * 1.001})
    assert measured.distance(reference_curve(initial(kind), batches, changed)) > 10 * ALLOWED


WAYS: dict[int, list[tuple[tuple[int, int], bool, int]]] = {
    1: [((1, 1), False, 1)],
    2: [((1, 2), False, 1), ((2, 1), False, 2)],
}
FOUR: dict[str, list[tuple[tuple[int, int], bool, int]]] = {
    "gpt": [((1, 4), False, 1)],
    "llama": [((2, 2), False, 1), ((2, 2), True, 2)],
}


@distributed(world_size=[1, 2], timeout=300, backend="shm")
def test_the_curve_is_that_of_one_device(world_size: int, kind: str, measured: Spread) -> None:
    check(kind, measured, WAYS[world_size])


@pytest.mark.slow
@distributed(world_size=4, timeout=300, backend="shm")
def test_the_curve_of_four_ranks_is_that_of_one_device(kind: str, measured: Spread) -> None:
    check(kind, measured, FOUR[kind])


def check(kind: str, measured: Spread, ways: list[tuple[tuple[int, int], bool, int]]) -> None:
    for grid, sharded, accumulate in ways:
        distance = measured.distance(train(kind, grid, sharded, accumulate))
        assert distance < ALLOWED, f"dp, tp = {grid}, sharded {sharded}, micro-batches {accumulate}: {distance}"


@distributed(world_size=[2], timeout=300)
@pytest.mark.parametrize(
    "planted",
    [
        *(pytest.param(planted, marks=pytest.mark.slow) for planted in ("local mean", "rate of a shard")),
        "no sum over dp",
        "no sum over tp",
    ],
)
@pytest.mark.parametrize("kind", ["llama"])
def test_a_mistake_is_far(
    world_size: int, kind: str, planted: str, measured: Spread, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, accumulate, more = (2, 1), 1, {}
    if planted == "local mean":  # each rank's own tokens: gradients, and what is reported, are not those of the batch
        original = decoder.vocab_parallel_cross_entropy
        monkeypatch.setattr(
            decoder, "vocab_parallel_cross_entropy", lambda *a, token_axes, **k: original(*a, token_axes=(), **k)
        )
    elif planted == "no sum over dp":
        accumulate = 2
        monkeypatch.setattr("shardgrad.train.step.all_reduce_partial_grads_", lambda model: None)
    elif planted == "no sum over tp":  # of the norms' gradients
        grid = (1, 2)
        monkeypatch.setattr("shardgrad.nn.norm.row_pieces", lambda parameters, shardings, mesh, dims: [parameters])
    else:
        grid, more = (1, 2), {"rate": 1.001}
    distance = measured.distance(train(kind, grid, False, accumulate, **more))
    assert distance > 10 * ALLOWED
